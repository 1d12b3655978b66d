"""Decoders of single frames. Decoding many frames in columns belongs in `columnar`.

Two depths. The *head* (type, sid, seq) is all that capture needs of most frames and costs a third of
a microsecond. The *body* types serve `book`, `watch`, the slow path of `columnar` and the tests.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kalshi_platform.journal.kind import Kind

__all__ = [
    "SNAPSHOT_BYTES",
    "DecodeError",
    "Delta",
    "Head",
    "Kind",
    "LifecycleEvent",
    "Reply",
    "Seq",
    "Sid",
    "Snapshot",
    "Trade",
    "decode_delta",
    "decode_head",
    "decode_lifecycle_event",
    "decode_reply",
    "decode_snapshot",
    "decode_trade",
    "kind_of",
    "market_of",
    "sending_ts_ms",
    "trade_id",
]

Sid = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Head(msgspec.Struct, gc=False):
    """The part that every frame has. `sid` and `seq` are 0 where the frame carries none."""

    type: str
    sid: Sid = 0
    seq: Seq = 0


class _Market(msgspec.Struct, gc=False):
    market_ticker: str = ""


class _MarketFrame(msgspec.Struct, gc=False):
    msg: _Market


class Reply(msgspec.Struct):
    """A reply to a command: `subscribed`, `ok`, `unsubscribed` or `error`."""

    type: str
    id: int = 0
    sid: Sid = 0
    seq: Seq = 0
    msg: Any = None


class Delta(msgspec.Struct):
    """Body of an `orderbook_delta`: fixed-point fields, or integer cents before March 2026.

    A field that the book does not need may have any type: an unreadable one must not cost the change.
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
    clock: Any = None


class Snapshot(msgspec.Struct):
    """Body of an `orderbook_snapshot`. The key of an empty side is absent (or null).

    The book does not need `market_id` and `clock`, so they may have any type; `market_id` is empty for a ticker
    that the exchange does not know.
    """

    market_ticker: str
    market_id: Any = None
    clock: Any = None
    yes_dollars_fp: list[tuple[str, str]] | None = None
    no_dollars_fp: list[tuple[str, str]] | None = None
    yes_dollars: list[tuple[str, int | str]] | None = None
    no_dollars: list[tuple[str, int | str]] | None = None
    yes: list[tuple[int, int]] | None = None
    no: list[tuple[int, int]] | None = None


class Trade(msgspec.Struct):
    """Body of a `trade`: fixed-point fields, or integer cents and contracts before March 2026.

    A trade backfilled from REST has `ticker` and `created_time` instead of `market_ticker` and `ts_ms`.
    """

    trade_id: str | None = None
    """None where the exchange sent none, as in documented frames from before March 2026."""
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


class _Sent(msgspec.Struct, gc=False):
    sending_ts_ms: Any = None


class _TradeId(msgspec.Struct, gc=False):
    trade_id: str = ""


class LifecycleEvent(msgspec.Struct, frozen=True):
    """Body of a `market_lifecycle_v2`: the fields that recording uses. Times are Unix seconds."""

    market_ticker: str
    event_type: str
    """created, activated, deactivated, close_date_updated, determined, settled, and others."""
    open_ts: int | None = None
    close_ts: int | None = None
    additional_metadata: dict[str, Any] | None = None

    @property
    def event_ticker(self) -> str:
        """The market's event, sent when a market is created; else empty."""
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


class _LifecycleFrame(msgspec.Struct):
    msg: LifecycleEvent


decode_head = msgspec.json.Decoder(Head).decode
decode_reply = msgspec.json.Decoder(Reply).decode
_market = msgspec.json.Decoder(_MarketFrame).decode
_delta = msgspec.json.Decoder(_DeltaFrame).decode
_snapshot = msgspec.json.Decoder(_SnapshotFrame).decode
_trade = msgspec.json.Decoder(_TradeFrame).decode
_sent = msgspec.json.Decoder(_Sent).decode
_trade_id = msgspec.json.Decoder(_TradeIdFrame).decode
_life = msgspec.json.Decoder(_LifecycleFrame).decode
DecodeError = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for malformed bytes; RecursionError for excessive nesting."""


_KINDS = {
    "orderbook_delta": Kind.DELTA,
    "orderbook_snapshot": Kind.SNAPSHOT,
    "trade": Kind.TRADE,
}


def kind_of(frame: bytes) -> Kind:
    """Classify a frame by its type alone, without a session.

    Args:
        frame: One message of the WebSocket, as received.

    Returns:
        SNAPSHOT, DELTA or TRADE; CONTROL for any other type; MALFORMED for bytes that are no JSON object with a type.
    """
    try:
        return _KINDS.get(decode_head(frame).type, Kind.CONTROL)
    except DecodeError:
        return Kind.MALFORMED


def market_of(frame: bytes) -> str:
    """Read the ticker of the market that a frame is about.

    Args:
        frame: One message of the WebSocket, as received.

    Returns:
        The ticker; empty where it cannot be read.
    """
    try:
        return _market(frame).msg.market_ticker
    except DecodeError:
        return ""


def decode_delta(frame: bytes) -> Delta:
    """Decode the body of a delta frame.

    Args:
        frame: One message of the WebSocket, as received.

    Returns:
        The body, in either wire form.

    Raises:
        msgspec.DecodeError: The frame is no delta; or another of `DecodeError`.
    """
    return _delta(frame).msg


SNAPSHOT_BYTES = 4 << 20
"""An upper bound for snapshots: a book's 20,002 levels take less than 1 MB of JSON. Larger frames are not
decoded, because decoding takes about twenty times their size in memory."""


def decode_snapshot(frame: bytes) -> Snapshot:
    """Decode the body of a snapshot frame.

    Args:
        frame: One message of the WebSocket, as received.

    Returns:
        The body, in any wire form.

    Raises:
        msgspec.DecodeError: The frame is no snapshot, or larger than `SNAPSHOT_BYTES`; or another of `DecodeError`.
    """
    if len(frame) > SNAPSHOT_BYTES:
        raise msgspec.DecodeError(
            f"the snapshot has {len(frame):,} bytes, and no book has {SNAPSHOT_BYTES:,}"
        )
    return _snapshot(frame).msg


def decode_trade(frame: bytes) -> Trade:
    """Decode the body of a trade frame.

    Args:
        frame: One message of the WebSocket, or a trade of REST in such a frame.

    Returns:
        The body, in any wire form.

    Raises:
        msgspec.DecodeError: The frame is no trade; or another of `DecodeError`.
    """
    return _trade(frame).msg


def sending_ts_ms(frame: bytes) -> Any:
    """Read when the exchange queued a frame for sending.

    Args:
        frame: One message of the WebSocket, as received.

    Returns:
        Unix milliseconds, or whatever else was sent; None where the frame has no such field.

    Raises:
        msgspec.DecodeError: The frame is no JSON object; or another of `DecodeError`.
    """
    return _sent(frame).sending_ts_ms


def trade_id(frame: bytes) -> str:
    """Read the id of a trade frame.

    Args:
        frame: One message of the WebSocket, or a trade of REST in such a frame.

    Returns:
        The id; empty where the frame has none.

    Raises:
        msgspec.DecodeError: The frame is no trade; or another of `DecodeError`.
    """
    return _trade_id(frame).msg.trade_id


def decode_lifecycle_event(frame: bytes) -> LifecycleEvent:
    """Decode the body of a `market_lifecycle_v2` frame.

    Args:
        frame: One message of the WebSocket, as received.

    Returns:
        The body; times are Unix seconds.

    Raises:
        msgspec.DecodeError: The frame is no life event; or another of `DecodeError`.
    """
    return _life(frame).msg
