"""A complete engine: it quotes one market of the bundled simulator, gets fills, and records everything.

    kalshi-platform up                       # the simulator and ClickHouse, in another terminal
    python examples/engine.py --seconds 30
    kalshi-platform qa

The book comes over the WebSocket. Orders and the account are on the simulator's own pages, which the real exchange
does not have: in your engine the exchange's client replaces `SimulatorGateway`, and everything else stays.
"""

import argparse
import asyncio
import json
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal

from kalshi_platform import engine as mm
from kalshi_platform import settings
from kalshi_platform.exchange import frames
from kalshi_platform.exchange.book import Book, SyncState, delta_change
from kalshi_platform.exchange.connection import LiveConnection, dial
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.simulator.orders import Account, Answered, Request
from kalshi_platform.simulator.paper import SimulatorGateway

SIZE, MOST_HELD, YES = Decimal("5.00"), Decimal(40), mm.Contract.YES


class Engine:
    def __init__(self, gateway: SimulatorGateway, recorder: mm.Recorder) -> None:
        self.gateway, self.recorder, self.orders = gateway, recorder, mm.LiveOrders()
        account = gateway.account(0, (), 1)
        self.ticker, self.last_fill = account.tops[0].ticker, account.last_fill
        self.book, self.prices = Book(self.ticker), dict[str, Decimal]()
        self.held = self.reported(account)

    def reported(self, account: Account) -> mm.Reconciled:
        """Return the position as the exchange reports it, and record it as a snapshot."""
        position_fp = account.positions.get(self.ticker, "0.00")
        position = mm.Reconciled.from_exchange(self.ticker, position_fp, datetime.now(UTC))
        self.recorder.snapshot(position, source="account", raw={"position_fp": position_fp})
        return position

    def on_frame(self, frame: bytes) -> None:
        """Update the book. A real engine checks the sequence numbers, too."""
        kind = frames.kind_of(frame)
        if kind is frames.Kind.SNAPSHOT:
            self.book.apply_snapshot(frames.decode_snapshot(frame))
        elif kind is frames.Kind.DELTA:
            self.book.apply_delta(delta_change(frames.decode_delta(frame)))

    def loop(self) -> None:
        """Read the account, decide, act."""
        self.hear(self.gateway.account(self.last_fill, [self.ticker], 0))
        now = mm.inventory(self.held, self.orders.working(self.ticker))
        wanted = self.targets(now)
        decided = self.recorder.decision(
            now,
            mm.Quoted(
                target_bid_px=float(wanted.get(mm.Quote.BID, mm.NOTHING)),
                target_ask_px=float(wanted.get(mm.Quote.ASK, mm.NOTHING)),
            ),
            allowed=bool(wanted),
            block_codes=[] if wanted else ["no_market"],
        )
        live = {order.quote: order for order in self.orders.live(self.ticker)}
        for quote in mm.Quote:
            order, price = live.get(quote), wanted.get(quote)
            if order is not None and self.prices[order.sent.client_order_id] != price:
                self.cancel(order, decided.decision_id)
            elif order is None and price is not None:
                self.place(quote, price, decided.decision_id)

    def targets(self, now: mm.Inventory) -> dict[mm.Quote, Decimal]:
        """Return quotes at the best price of each side, as far as the position limit allows."""
        bid, ask = self.book.best("yes"), self.book.best("no")
        if bid is None or ask is None or self.book.state is not SyncState.SYNCED:
            return {}
        prices = {
            mm.Quote.BID: Decimal(bid[0]) / 10_000,
            mm.Quote.ASK: 1 - Decimal(ask[0]) / 10_000,
        }
        after = {q: now.pos_filled + mm.sign(q, YES) * SIZE for q in prices}
        return {q: price for q, price in prices.items() if abs(after[q]) <= MOST_HELD}

    def hear(self, account: Account) -> None:
        """Record the fills, and the orders that the exchange has canceled by itself."""
        for fill in account.fills:
            side, size = mm.Contract(fill.outcome_side), Decimal(fill.count)
            at = datetime.fromtimestamp(fill.ts_us / 1e6, UTC)
            order = self.orders.filled(fill.client_order_id, size)
            self.held = self.held.filled(side, size, at)
            self.recorder.fill(
                self.ticker,
                fill.fill_id,
                side,
                size,
                Decimal(fill.price),
                at=at,
                exchange_order_id=fill.order_id,
                client_order_id=fill.client_order_id,
            )
            self.recorder.order_changed(order.sent, order.status or mm.OrderStatus.RESTING)
        if account.fills:
            self.reported(account)
        self.last_fill = account.last_fill
        resting = {order.client_order_id for order in account.orders}
        for order in self.orders.live(self.ticker):
            if order.sent.client_order_id not in resting:  # at the market's close, say
                self.orders.heard(order.sent.client_order_id, mm.OrderStatus.CANCELED)
                self.recorder.order_changed(order.sent, mm.OrderStatus.CANCELED)

    def place(self, quote: mm.Quote, price: Decimal, decision_id: uuid.UUID) -> None:
        name = str(uuid.uuid4())
        sent = self.recorder.action(
            self.ticker,
            name,
            mm.ActionType.PLACE,
            quote=quote,
            contract=YES,
            price=price,
            size=SIZE,
            decision_id=decision_id,
        )
        self.orders.placed(sent, YES, quote, SIZE)
        self.prices[name] = price
        answer = self.send(sent, "place", quote=quote.value, price=f"{price:.4f}", count=str(SIZE))
        self.orders.heard(name, answer.status)

    def cancel(self, order: mm.LiveOrder, decision_id: uuid.UUID) -> None:
        name = order.sent.client_order_id
        sent = self.recorder.action(
            self.ticker, name, mm.ActionType.CANCEL, size=order.remaining, decision_id=decision_id
        )
        if self.send(sent, "cancel").status == "canceled":  # else filled: the next account has it
            self.orders.heard(name, mm.OrderStatus.CANCELED)

    def send(self, sent: mm.Sent, action: str, **more: str) -> Answered:
        began = time.perf_counter()
        request = Request(
            client_order_id=sent.client_order_id, ticker=self.ticker, action=action, **more
        )
        (answer,) = self.gateway.send([request])
        self.recorder.response(
            sent,
            answer.status,
            exchange_order_id=answer.order_id,
            reject_reason=answer.reject_reason,
            latency_ms=(time.perf_counter() - began) * 1000,
        )
        return answer


async def run(seconds: float) -> None:
    config = settings.current()
    if config.has_key:
        raise SystemExit("PROD_KEYID is set, and this engine quotes the simulator alone. Unset it.")
    exchange, until = config.exchange, time.monotonic() + seconds
    recorder = mm.Recorder(
        "example", "1.0", settings=config, spool=config.data_dir / "example_engine"
    )
    with SimulatorGateway(config.simulator_port) as gateway:
        engine, loop_at = Engine(gateway, recorder), 0.0
        credentials = Credentials(exchange.key_id, load_signer(exchange.key_file))
        socket = await dial(exchange.ws_url, credentials, LiveConnection)
        params = {"channels": ["orderbook_delta"], "market_tickers": [engine.ticker]}
        await socket.send(json.dumps({"id": 1, "cmd": "subscribe", "params": params}))
        while time.monotonic() < until:
            with suppress(TimeoutError):
                engine.on_frame(await asyncio.wait_for(socket.recv(decode=False), 0.05))
            if time.monotonic() >= loop_at:
                engine.loop()
                loop_at = time.monotonic() + 0.1
        for order in engine.orders.live(engine.ticker):
            engine.cancel(order, uuid.UUID(int=0))
        engine.hear(gateway.account(engine.last_fill, [engine.ticker], 0))
        await socket.close()
    print(f"{engine.ticker}: {engine.held.position} held, {recorder.status()}")
    print(f"{recorder.close()} files wait for ClickHouse.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    asyncio.run(run(parser.parse_args().seconds))
