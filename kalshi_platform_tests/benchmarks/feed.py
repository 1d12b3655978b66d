"""An exchange that only sends: made-up order flow, as fast as the socket takes it or at a steady rate.

The deltas are laid out beforehand as the bytes that go over the wire, so that on a machine of two
cores the sender costs next to nothing and the receiver is what is measured. The books are sound: what
is taken away was there before. `python -m kalshi_platform_tests.benchmarks.feed FILE …` serves one client
and says on its output, a line of JSON each, where it listens, when it began and when it had sent all.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from kalshi_platform.exchange.auxiliary_channel import BATCH
from kalshi_platform.exchange.session import CHANNEL

PATH = "/trade-api/ws/v2"
CHUNK = 250_000
LAG = 20_000
"""How many later orders arrive while an order stays on the book."""
START_US = 1_790_000_000_000_000
STEP_US = 137
QUEUED_MS = 1
"""From the exchange's time of a change to the time at which the exchange queues its frame."""
FIRST_CLOCK = 4_000_000
"""Of every market's snapshot."""
PACE_S = 0.005
CALM_S = 0.5
"""A client that has all its books and sends no command for this time has finished subscribing."""
LEVELS = [[f"0.{price}00", "500.00"] for price in range(30, 50)]
STORM_LEVELS = [[f"{price / 200:.4f}", "10000000.00"] for price in range(10, 100)]
"""More than any order takes away later."""

_TEXT = [
    pl.lit('{"type":"orderbook_delta","sid":1,"seq":'),
    pl.col("seq"),
    pl.lit(',"sending_ts_ms":'),
    pl.col("sent_ms"),
    pl.lit(',"msg":{"market_ticker":"'),
    pl.col("ticker"),
    pl.lit('","market_id":"'),
    pl.col("id"),
    pl.lit('","clock":'),
    pl.col("clock"),
    pl.lit(',"price_dollars":"0.'),
    pl.col("price"),
    pl.lit('00","delta_fp":"'),
    pl.col("sign"),
    pl.col("whole"),
    pl.lit("."),
    pl.col("part"),
    pl.lit('","side":"'),
    pl.col("side"),
    pl.lit('","ts":"'),
    pl.col("ts"),
    pl.lit('","ts_ms":'),
    pl.col("ts_ms"),
    pl.lit("}}\n"),
]
"""A delta, as the exchange lays it out since October 2026."""


def ticker(market: int) -> str:
    """The ticker of a made-up market."""
    return f"KXBENCH-26NOV22-T{market:05d}"


def market_id(market: int) -> str:
    """Its UUID."""
    return f"{market:08x}-0000-4000-8000-000000000000"


def first_seq(markets: int) -> int:
    """The number of the first delta: a snapshot for each market and an `ok` for each further command."""
    return markets + -(-markets // BATCH)


def write_deltas(
    path: Path, frames: int, markets: int, seed: int = 1, storm_at: int | None = None
) -> int:
    """Lay out `frames` deltas as WebSocket frames; returns the bytes of their JSON.

    A few markets get most of the flow, as on the exchange. Beside the file, `.offsets.npy` says where
    each frame ends. `storm_at`: after so many deltas comes a snapshot of every market.
    """
    random = np.random.default_rng(seed)
    pairs = -(-frames // 2)
    weight = 1 / np.arange(1, markets + 1) ** 0.8
    market = random.choice(markets, pairs, p=weight / weight.sum())
    side = random.integers(0, 2, pairs)
    price = random.integers(30, 50, pairs)
    size = random.integers(1, 40_000, pairs)
    names = pl.Series([ticker(m) for m in range(markets)])
    ids = pl.Series([market_id(m) for m in range(markets)])
    clocks = np.full(markets, FIRST_CLOCK, np.int64)
    payload_bytes, offset, ends = 0, 0, []
    with path.open("wb") as file:
        starts = sorted({*range(0, frames, CHUNK), *([] if storm_at is None else [storm_at])})
        for start, end in pairwise([*starts, frames]):
            i = np.arange(start, end)
            shift = first_seq(markets) + (0 if storm_at is None or start < storm_at else markets)
            taken = (i % 2 == 1) & (i // 2 >= LAG)
            pair = np.where(taken, i // 2 - LAG, i // 2)
            qty = np.where(taken, -size[pair], np.where(i % 2 == 1, 1, size[pair]))
            # The second of a pair takes an earlier one away; before there is one, it adds a little.
            at = pl.Series(START_US + i * STEP_US).cast(pl.Datetime("us", "UTC"))
            of = pl.Series("market", market[pair])
            change = of.to_frame().select(pl.int_range(1, pl.len() + 1).over("market")).to_series()
            columns = pl.DataFrame(
                {
                    "seq": i + shift,
                    "sent_ms": at.dt.epoch("ms") + QUEUED_MS,
                    "clock": clocks[market[pair]] + change.to_numpy(),
                    "ticker": names.gather(market[pair]),
                    "id": ids.gather(market[pair]),
                    "price": price[pair],
                    "whole": np.abs(qty) // 100,
                    "part": pl.Series(np.abs(qty) % 100).cast(pl.String).str.zfill(2),
                    "sign": pl.Series(["", "-"]).gather((qty < 0).astype(np.uint32)),
                    "side": pl.Series(["yes", "no"]).gather(side[pair]),
                    "ts": at.dt.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"),
                    "ts_ms": at.dt.epoch("ms"),
                }
            ).cast(pl.String)
            text = columns.select(pl.concat_str(_TEXT)).to_series()
            if start == storm_at:
                storm = [
                    _storm(m, start + first_seq(markets) + m, int(clocks[m]))
                    for m in range(markets)
                ]
                text = pl.concat([pl.Series(storm).cast(pl.String), text])
            clocks += np.bincount(market[pair], minlength=markets)
            lengths = text.str.len_bytes()
            headers = {
                n: Frame(Opcode.TEXT, bytes(n)).serialize(mask=False)[:-n] for n in lengths.unique()
            }
            header = pa.array([headers[n] for n in lengths.to_list()], pa.binary())
            framed = pc.binary_join_element_wise(header, text.to_arrow().cast(pa.binary()), b"")
            data = framed.buffers()[2][: int(pc.sum(pc.binary_length(framed)).as_py())]
            file.write(data)
            payload_bytes += int(lengths.sum())
            ends.append(offset + np.cumsum(pc.binary_length(framed).to_numpy(), dtype=np.int64))
            offset += len(data)
    np.save(path.with_suffix(".offsets.npy"), np.concatenate(ends))
    return payload_bytes


def payloads(path: Path, frames: int) -> list[bytes]:
    """The JSON of the first frames of such a file."""
    ends = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")[:frames]
    with path.open("rb") as file:
        data = file.read(int(ends[-1]))
    starts = [0, *ends[:-1].tolist()]
    header = 4  # of a message of 126 to 65,535 bytes
    return [data[start + header : end] for start, end in zip(starts, ends, strict=True)]


def snapshots(markets: int) -> Iterator[bytes]:
    """The snapshots of the first connection, as JSON."""
    for market in range(markets):
        yield _encoded(_snapshot(market, market + 1))


def _snapshot(
    market: int, seq: int, clock: int = FIRST_CLOCK, levels: Sequence[Sequence[str]] = LEVELS
) -> dict[str, Any]:
    message = {
        "market_ticker": ticker(market),
        "market_id": market_id(market),
        "clock": clock,
        "yes_dollars_fp": levels,
        "no_dollars_fp": levels,
    }
    sent_ms = START_US // 1000
    head = {"type": "orderbook_snapshot", "sid": 1, "seq": seq, "sending_ts_ms": sent_ms}
    return head | {"msg": message}


def _storm(market: int, seq: int, clock: int) -> bytes:
    return _encoded(_snapshot(market, seq, clock, STORM_LEVELS))


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class _Peer:
    """One client's connection, through the library's protocol without I/O."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._protocol = ServerProtocol()
        while True:
            for event in self._events():
                if isinstance(event, Request):
                    self._protocol.send_response(self._protocol.accept(event))
                    self._flush()
                    return

    def messages(self) -> Iterator[dict[str, Any]]:
        """The client's commands, until none comes for as long as the socket waits."""
        while True:
            try:
                events = self._events()
            except TimeoutError:
                return
            for event in events:
                if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                    yield json.loads(bytes(event.data))

    def send(self, message: dict[str, Any]) -> None:
        """One message."""
        self._protocol.send_text(_encoded(message))
        self._flush()

    def keep_alive(self) -> None:
        """Ping, as the exchange does, until the client goes."""
        self.socket.settimeout(10.0)
        while True:
            try:
                self._events()
            except TimeoutError:
                self._protocol.send_ping(b"heartbeat")
                self._flush()
            except ConnectionError:
                return

    def _events(self) -> list[Any]:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the client has gone")
        self._protocol.receive_data(data)
        events = self._protocol.events_received()
        self._flush()
        return events

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self.socket.sendall(data)


def _subscribe(peer: _Peer, markets: int) -> None:
    """Answer commands until every market has had its snapshot, and the client sends no more."""
    seq, sids, answered = 1, 0, 0
    for command in peer.messages():
        params = command.get("params", {})
        tickers = params.get("market_tickers", [])
        if command["cmd"] == "subscribe":
            books = False
            for channel in params["channels"]:
                sids += 1
                books |= channel == CHANNEL
                message = {"channel": channel, "sid": 1 if channel == CHANNEL else 1 + sids}
                peer.send({"type": "subscribed", "id": command["id"], "msg": message})
            if not books:
                continue
        elif params.get("sids") == [1]:
            peer.send({"type": "ok", "id": command["id"], "sid": 1, "seq": seq, "msg": {}})
            seq += 1
        else:
            continue
        for name in tickers:
            peer.send(_snapshot(int(name.rpartition("T")[2]), seq))
            seq += 1
            answered += 1
        if answered == markets:
            peer.socket.settimeout(CALM_S)
    if seq != first_seq(markets):
        raise RuntimeError(f"the deltas begin at {first_seq(markets)}, the snapshots end at {seq}")
    peer.socket.settimeout(None)


def _stream(peer: _Peer, path: Path, frames: int, rate: float) -> None:
    """Send the first `frames`, at `rate` a second; 0: as fast as they are taken."""
    ends = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")
    ends = ends if frames < 0 else ends[:frames]
    if not len(ends):
        return
    began, sent, offset = time.monotonic(), 0, 0
    with path.open("rb") as file:
        while sent < len(ends):
            due = min(int((time.monotonic() - began) * rate), len(ends)) if rate else len(ends)
            end = int(ends[due - 1]) if due else 0
            while offset < end:
                offset += os.sendfile(peer.socket.fileno(), file.fileno(), offset, end - offset)
            sent = due
            if rate:
                time.sleep(PACE_S)


def _rest(markets: int) -> ThreadingHTTPServer:
    """The exchange's list of markets, and nothing else."""
    listed = [
        {"ticker": ticker(m), "event_ticker": "KXBENCH-26NOV22", "status": "active"}
        for m in range(markets)
    ]
    body = json.dumps({"markets": listed, "cursor": ""}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.partition("?")[0].endswith("/markets")
            self.send_response(200 if known else 404)
            answer = body if known else b'{"msg":"not here"}'
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def _say(**what: object) -> None:
    click.echo(json.dumps(what))


@click.command(help=__doc__)
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--markets", default=500, show_default=True)
@click.option("--frames", default=-1, help="How many of the file's frames to send; -1: all.")
@click.option("--rate", default=0.0, help="Frames a second; 0: as fast as they are taken.")
@click.option("--again", is_flag=True, help="Then close the connection, and serve the next one.")
def main(path: Path, markets: int, frames: int, rate: float, again: bool) -> None:
    """Serve one client."""
    rest = _rest(markets)
    threading.Thread(target=rest.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ws = f"ws://127.0.0.1:{listener.getsockname()[1]}{PATH}"
        _say(ws_url=ws, rest_url=f"http://127.0.0.1:{rest.server_port}/trade-api/v2")
        for last in (False, True) if again else (True,):
            connection, _ = listener.accept()
            with connection:
                peer = _Peer(connection)
                _subscribe(peer, markets)
                _say(began_ns=time.time_ns())
                _stream(peer, path, frames, rate)
                _say(sent_ns=time.time_ns())
                if last:
                    peer.keep_alive()


if __name__ == "__main__":
    main()
