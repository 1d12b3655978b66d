"""Frames as the exchange sends them, and just enough decoding to act on one.

Two depths. The *head* (type, sid, seq) is all that capture needs of most frames and costs a third of
a microsecond. The *body* types here serve the book in `book.py`, the wire watcher and the tests; the
load decodes millions of bodies by columns instead (`exchange/columnar.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kalshi_platform.journal.kind import Kind

Sid = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Head(msgspec.Struct, gc=False):
    """The part that every frame has. `sid` and `seq` are 0 where the frame carries none."""

    type: str
    sid: Sid = 0
    seq: Seq = 0


class _MarketOf(msgspec.Struct, gc=False):
    market_ticker: str = ""


class _SubjectFrame(msgspec.Struct, gc=False):
    msg: _MarketOf


class Reply(msgspec.Struct):
    """An answer to a command: `subscribed`, `ok`, `unsubscribed` or `error`."""

    type: str
    id: int = 0
    sid: Sid = 0
    seq: Seq = 0
    msg: Any = None


class Delta(msgspec.Struct):
    """Body of an `orderbook_delta`: fixed-point fields, or integer cents before March 2026.

    A field that the book does not need may hold anything: an odd one never costs the change itself.
    """

    market_ticker: str
    side: str
    market_id: Any = None
    price_dollars: str | None = None
    delta_fp: str | None = None
    price: int | None = None
    delta: int | None = None
    ts: Any = None
    """RFC 3339."""
    ts_ms: Any = None
    """Milliseconds since the epoch; read where `ts` is missing."""
    client_order_id: Any = None


class Snapshot(msgspec.Struct):
    """Body of an `orderbook_snapshot`. The key of an empty side is absent (or null).

    `market_id` is not needed by the book and may hold anything; the exchange sends an empty one for a
    ticker that it does not know.
    """

    market_ticker: str
    market_id: Any = None
    yes_dollars_fp: list[tuple[str, str]] | None = None
    no_dollars_fp: list[tuple[str, str]] | None = None
    yes_dollars: list[tuple[str, int | str]] | None = None
    no_dollars: list[tuple[str, int | str]] | None = None
    yes: list[tuple[int, int]] | None = None
    no: list[tuple[int, int]] | None = None


class Trade(msgspec.Struct):
    """Body of a `trade`: fixed-point fields, or integer cents and contracts before March 2026.

    One that REST told has `ticker` and `created_time` in the place of `market_ticker` and `ts_ms`.
    """

    trade_id: str | None = None
    """None where the exchange sent none, as in documented frames of before March 2026."""
    market_ticker: str | None = None
    ticker: str | None = None
    yes_price_dollars: str | None = None
    no_price_dollars: str | None = None
    yes_price: int | None = None
    no_price: int | None = None
    count_fp: str | None = None
    count: int | None = None
    taker_outcome_side: str | None = None
    taker_book_side: str | None = None
    taker_side: str | None = None
    is_block_trade: bool | None = None
    ts: int | None = None
    """Unix seconds."""
    ts_ms: int | None = None
    created_time: str | None = None


class _TradeId(msgspec.Struct, gc=False):
    trade_id: str = ""


class LifeEvent(msgspec.Struct, frozen=True):
    """Body of a `market_lifecycle_v2`, as far as recording depends on it. Times are Unix seconds."""

    market_ticker: str
    event_type: str
    """created, activated, deactivated, close_date_updated, determined, settled, and others."""
    open_ts: int | None = None
    close_ts: int | None = None
    additional_metadata: dict[str, Any] | None = None

    @property
    def event_ticker(self) -> str:
        """The market's event, where it is told: when a market is created."""
        ticker = (self.additional_metadata or {}).get("event_ticker")
        return ticker if isinstance(ticker, str) else ""


class _DeltaFrame(msgspec.Struct):
    msg: Delta


class _SnapshotFrame(msgspec.Struct):
    msg: Snapshot


class _TradeFrame(msgspec.Struct):
    msg: Trade


class _TradeIdFrame(msgspec.Struct):
    msg: _TradeId


class _LifeFrame(msgspec.Struct):
    msg: LifeEvent


decode_head = msgspec.json.Decoder(Head).decode
decode_reply = msgspec.json.Decoder(Reply).decode
_subject = msgspec.json.Decoder(_SubjectFrame).decode
_delta = msgspec.json.Decoder(_DeltaFrame).decode
_snapshot = msgspec.json.Decoder(_SnapshotFrame).decode
_trade = msgspec.json.Decoder(_TradeFrame).decode
_trade_id = msgspec.json.Decoder(_TradeIdFrame).decode
_life = msgspec.json.Decoder(_LifeFrame).decode
DecodeError = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises on bytes that are not what they should be; the last for brackets without end."""


_KINDS = {
    "orderbook_delta": Kind.DELTA,
    "orderbook_snapshot": Kind.SNAPSHOT,
    "trade": Kind.TRADE,
}


def kind_of(frame: bytes) -> Kind:
    """What a frame is by its type alone, without a session."""
    try:
        return _KINDS.get(decode_head(frame).type, Kind.CONTROL)
    except DecodeError:
        return Kind.MALFORMED


def subject(frame: bytes) -> str:
    """The ticker of the market that a frame is about; empty where it cannot be read."""
    try:
        return _subject(frame).msg.market_ticker
    except DecodeError:
        return ""


def decode_delta(frame: bytes) -> Delta:
    """The body of a delta frame; raises one of `DecodeError`."""
    return _delta(frame).msg


SNAPSHOT_BYTES = 4 << 20
"""More than any snapshot has: a book's 20,002 levels take less than 1 MB of JSON. What is larger is not
read, for it would take some twenty times its size in memory."""


def decode_snapshot(frame: bytes) -> Snapshot:
    """The body of a snapshot frame; raises one of `DecodeError`."""
    if len(frame) > SNAPSHOT_BYTES:
        raise msgspec.DecodeError(
            f"the snapshot has {len(frame):,} bytes, and no book has {SNAPSHOT_BYTES:,}"
        )
    return _snapshot(frame).msg


def decode_trade(frame: bytes) -> Trade:
    """The body of a trade frame; raises one of `DecodeError`."""
    return _trade(frame).msg


def trade_id(frame: bytes) -> str:
    """The id of a trade frame, empty where it has none; raises one of `DecodeError`."""
    return _trade_id(frame).msg.trade_id


def decode_life_event(frame: bytes) -> LifeEvent:
    """The body of a `market_lifecycle_v2` frame; raises one of `DecodeError`."""
    return _life(frame).msg
