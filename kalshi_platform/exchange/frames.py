"""Frames as the exchange sends them, and just enough decoding to act on one.

Two depths. The *head* (type, sid, seq) is all that capture needs of most frames and costs a third of
a microsecond. The *body* types here serve the book in `book.py`, the wire watcher and the tests; the
load decodes millions of bodies by columns instead (`loading/decode.py`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any

import msgspec

Sid = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Kind(IntEnum):
    """What a journal record holds. The numbers are in the journal: never renumber."""

    NOTE = 0
    """Not a frame: something that happened to the recording, as JSON."""
    DELTA = 1
    SNAPSHOT = 2
    CONTROL = 3
    """Any other readable frame: acks, errors, other channels, types not known yet."""
    MALFORMED = 4
    """Bytes that are no JSON object with a type."""


class Head(msgspec.Struct, gc=False):
    """The part that every frame has. `sid` and `seq` are 0 where the frame carries none."""

    type: str
    sid: Sid = 0
    seq: Seq = 0


class _MarketOf(msgspec.Struct, gc=False):
    market_ticker: str = ""
    market_id: str | None = None


class SnapshotHead(msgspec.Struct, gc=False):
    """Which market a snapshot is of. An unknown ticker comes back with an empty `market_id`."""

    msg: _MarketOf


class Reply(msgspec.Struct):
    """An answer to a command: `subscribed`, `ok`, `unsubscribed` or `error`."""

    type: str
    id: int = 0
    sid: Sid = 0
    seq: Seq = 0
    msg: Any = None


class Delta(msgspec.Struct):
    """Body of an `orderbook_delta`: fixed-point fields, or integer cents before March 2026."""

    market_ticker: str
    side: str
    market_id: str | None = None
    price_dollars: str | None = None
    delta_fp: str | None = None
    price: int | None = None
    delta: int | None = None
    ts: str | None = None
    ts_ms: Any = None
    """Milliseconds since the epoch. Looked at where `ts` is missing, so it may be anything where it is not."""
    client_order_id: str | None = None


class Snapshot(msgspec.Struct):
    """Body of an `orderbook_snapshot`. The key of an empty side is absent (or null)."""

    market_ticker: str
    market_id: str | None = None
    yes_dollars_fp: list[tuple[str, str]] | None = None
    no_dollars_fp: list[tuple[str, str]] | None = None
    yes_dollars: list[tuple[str, int | str]] | None = None
    no_dollars: list[tuple[str, int | str]] | None = None
    yes: list[tuple[int, int]] | None = None
    no: list[tuple[int, int]] | None = None


class _DeltaFrame(msgspec.Struct):
    msg: Delta


class _SnapshotFrame(msgspec.Struct):
    msg: Snapshot


decode_head = msgspec.json.Decoder(Head).decode
decode_snapshot_head = msgspec.json.Decoder(SnapshotHead).decode
decode_reply = msgspec.json.Decoder(Reply).decode
_delta = msgspec.json.Decoder(_DeltaFrame).decode
_snapshot = msgspec.json.Decoder(_SnapshotFrame).decode
DecodeError = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises on bytes that are not what they should be; the last for brackets without end."""


def decode_delta(frame: bytes) -> Delta:
    """The body of a delta frame; raises one of `DecodeError`."""
    return _delta(frame).msg


def decode_snapshot(frame: bytes) -> Snapshot:
    """The body of a snapshot frame; raises one of `DecodeError`."""
    return _snapshot(frame).msg
