"""Drift: what the wire has that this version does not know, and what it lacks. No I/O.

The columnar decoders see each frame's fields while they decode: a range that fits their schemas has no unknown field
and no field of another type. Only the frames of other ranges are examined one by one (`examine`). A field
that frames of a type had, and lack later, is *missing*. A field that is null counts as absent on both paths, so that a
finding does not depend on how the journal is cut into ranges. Names come from a peer and are bounded in number
and length. Which findings become rows is decided in `loading.wire_drift`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import polars as pl

from kalshi_platform.exchange.frames import SNAPSHOT_BYTES, DecodeError
from kalshi_platform.printable import printable

UNKNOWN_FIELD, UNKNOWN_TYPE = "unknown field", "unknown type"
MISSING_FIELD, CHANGED_TYPE = "missing field", "changed type"

MOST_FINDINGS = 64
"""Different findings that are counted each in a range and in a day; all others are counted as `OTHERS`."""
OTHERS = "others"
_NAME_CHARACTERS = 64
_EXAMPLE_CHARACTERS = 80

_TEXT, _WHOLE, _NUMBER, _FLAG, _ANY = (str,), (int,), (int, float), (bool,), None
_KINDS: Mapping[str, tuple[type, ...] | None] = {
    "s": _TEXT,
    "i": _WHOLE,
    "n": _NUMBER,
    "b": _FLAG,
    "l": (list,),
    "a": _ANY,
}
_ENVELOPE = "type:s id:i sid:i seq:i sending_ts_ms:i msg:a market_tickers:l subscriptions:l"
_LIFECYCLE = (
    "market_ticker:s event_type:s exchange_index:i open_ts:i close_ts:i determination_ts:i settled_ts:i"
    " is_deactivated:b result:s settlement_value:a price_level_structure:s price_ranges:l"
    " additional_metadata:a strike_type:s floor_strike:n cap_strike:n custom_strike:a name:s title:s"
    " yes_sub_title:s no_sub_title:s rules_primary:s rules_secondary:s"
)
_BODIES: Mapping[str, str] = {
    "orderbook_delta": (
        "market_ticker:s market_id:s side:s price_dollars:s delta_fp:s price:i delta:i ts:s ts_ms:i clock:i"
        " client_order_id:s subaccount:i"
    ),
    "orderbook_snapshot": (
        "market_ticker:s market_id:s clock:i yes_dollars_fp:l no_dollars_fp:l yes_dollars:l no_dollars:l"
        " yes:l no:l"
    ),
    "trade": (
        "trade_id:s market_ticker:s yes_price_dollars:s no_price_dollars:s count_fp:s taker_side:s"
        " taker_outcome_side:s taker_book_side:s is_block_trade:b ts:i ts_ms:i yes_price:i no_price:i count:i"
        " ticker:s created_time:s"
    ),
    "subscribed": "channel:s sid:i",
    "unsubscribed": "",
    "ok": "market_tickers:l",
    "error": "code:i msg:s market_ticker:s market_tickers:l market_id:s market_ids:l service:s",
    "ticker": (
        "market_ticker:s market_id:s price_dollars:s yes_bid_dollars:s yes_ask_dollars:s yes_bid_size_fp:s"
        " yes_ask_size_fp:s last_trade_size_fp:s volume_fp:s open_interest_fp:s dollar_volume:i"
        " dollar_open_interest:i ts:i ts_ms:i time:s price:i yes_bid:i yes_ask:i volume:i open_interest:i"
    ),
    "market_lifecycle_v2": _LIFECYCLE,
    "multivariate_market_lifecycle": _LIFECYCLE,
    "event_lifecycle": (
        "event_ticker:s exchange_index:i title:s subtitle:s collateral_return_type:s series_ticker:s"
        " strike_date:a strike_period:s sub_title:s"
    ),
    "event_fee_update": "event_ticker:s fee_type_override:s fee_multiplier_override:n",
}
"""The known fields of each type's `msg`, with their JSON types: s text, i whole number, n number, b flag, l list, a any.
The recorder does not subscribe to the types of other channels; their fields are not examined."""


def _fields(text: str) -> dict[str, tuple[type, ...] | None]:
    return {name: _KINDS[kind] for name, kind in (each.split(":") for each in text.split())}


_KNOWN_ENVELOPE = _fields(_ENVELOPE)
_KNOWN = {name: _fields(text) for name, text in _BODIES.items()}
_OPTIONAL_FIELDS = frozenset(
    [
        "client_order_id",
        "subaccount",
        "yes_dollars_fp",
        "no_dollars_fp",
        "yes_dollars",
        "no_dollars",
        "yes",
        "no",
        "price",
        "delta",
        "id",
        "yes_price",
        "no_price",
        "count",
        "ticker",
        "created_time",
    ]
)
"""Fields that only some frames have; that one of them is missing means nothing."""
EXPECTED: Mapping[str, tuple[str, ...]] = {
    name: (
        "sending_ts_ms",
        *(f"msg.{each}" for each in _KNOWN[name] if each not in _OPTIONAL_FIELDS),
    )
    for name in ("orderbook_delta", "orderbook_snapshot", "trade")
}
"""The fields that each frame of a type has, once one had them."""

_SECRET = re.compile(r"key|token|secret|sign|auth|pass|session|cookie|user|order|account", re.I)
"""Names of fields whose values are not shown as examples."""
_decode = msgspec.json.Decoder().decode
_JSON_TYPES: Mapping[type, str] = {
    str: "text",
    bool: "flag",
    int: "whole number",
    float: "number",
    list: "list",
    dict: "object",
}


class Key(NamedTuple):
    """What a finding is about."""

    what: str
    type: str
    path: str

    def __str__(self) -> str:
        return "|".join(self)


@dataclass(frozen=True)
class Place:
    """The frame of a finding."""

    n: int
    recv_ns: int
    conn: str
    sid: int


@dataclass
class Finding:
    """What was found first in one frame, and in how many frames of the range."""

    place: Place
    found: str
    example: str
    count: int = 1


@dataclass
class Presence:
    """Where the frames of a range have an expected field."""

    present: int | None = None
    """The first record that has it."""
    absent: Place | None = None
    """The first frame that lacks it."""
    absent_after: Place | None = None
    """The first frame that lacks it after one that had it."""
    count: int = 0
    """How many frames lack it."""

    def frame(self, place: Place, *, has: bool) -> None:
        """Take the next frame."""
        if has:
            self.present = place.n if self.present is None else self.present
            return
        self.count += 1
        self.absent = self.absent or place
        if self.present is not None:
            self.absent_after = self.absent_after or place


@dataclass
class Drift:
    """What a range showed."""

    findings: dict[Key, Finding] = field(default_factory=dict)
    presence: dict[Key, Presence] = field(default_factory=dict)
    """By key of what is found where the field is missing."""

    def add(self, key: Key, place: Place, found: str, example: str) -> None:
        """Take a finding; records ascend."""
        known = self.findings.get(key)
        if known is None and len(self.findings) >= MOST_FINDINGS:
            key = Key(key.what, OTHERS, OTHERS)
            known = self.findings.get(key)
        if known is None:
            self.findings[key] = Finding(place, found, example)
        else:
            known.count += 1

    def examine(self, records: pl.DataFrame, *, expected: bool = False) -> None:
        """Examine the frames of records one by one; `expected`: also for expected fields that are missing."""
        for record in records.select("n", "recv_ns", "conn", "frame").iter_rows(named=True):
            frame = record["frame"]
            message = _object(frame)
            if message is None:
                continue  # its row is `malformed`
            sid = message.get("sid")
            place = Place(
                record["n"],
                record["recv_ns"],
                record["conn"],
                sid if isinstance(sid, int) and 0 <= sid < 1 << 32 else 0,
            )
            for key, found, example in examine(message):
                self.add(key, place, found, example)
            if expected:
                self._expect(message, place)

    def _expect(self, message: Mapping[str, Any], place: Place) -> None:
        name = message["type"]
        body = message.get("msg")
        if name not in EXPECTED or not isinstance(body, dict) or _is_backfilled(message):
            return
        for path in EXPECTED[name]:
            top, _, inner = path.partition(".")
            value = body.get(inner) if inner else message.get(top)
            presence = self.presence.setdefault(Key(MISSING_FIELD, name, path), Presence())
            presence.frame(place, has=value is not None)

    def expect(self, name: str, path: str, frames: pl.DataFrame, has: pl.Series) -> None:
        """Take the presence of an expected field in frames that were decoded in columns."""
        presence = self.presence.setdefault(Key(MISSING_FIELD, name, path), Presence())
        having, lacking = has.arg_true(), (~has).arg_true()
        presence.count += len(lacking)
        if len(having) and presence.present is None:
            presence.present = int(frames["n"][int(having[0])])
        if not len(lacking):
            return
        presence.absent = presence.absent or _place(frames, int(lacking[0]))
        if presence.present is not None and presence.absent_after is None:
            after = lacking.filter(frames["n"].gather(lacking) > presence.present)
            if len(after):
                presence.absent_after = _place(frames, int(after[0]))

    def expect_all(self, name: str, path: str, first_n: int) -> None:
        """Take an expected field that every frame has; `first_n`: the first record."""
        presence = self.presence.setdefault(Key(MISSING_FIELD, name, path), Presence())
        presence.present = first_n if presence.present is None else presence.present

    @classmethod
    def merged(cls, parts: Sequence[Drift]) -> Drift:
        """The parts of one range together, which are of different types; findings by record."""
        found = [item for part in parts for item in part.findings.items()]
        found.sort(key=lambda item: (item[1].place.n, item[0]))
        presence = {key: each for part in parts for key, each in part.presence.items()}
        return cls(dict(found), presence)


def examine(message: Mapping[str, Any]) -> Iterator[tuple[Key, str, str]]:
    """Yield (key, what was found, an example) for each field of a decoded frame that is not as it is known."""
    name = message["type"]
    known = _KNOWN.get(name)
    if known is None:
        if name not in NOT_EXAMINED:
            yield Key(UNKNOWN_TYPE, _name(name), ""), "", ""
        return
    if _is_backfilled(message):
        return
    body = message.get("msg")
    private = isinstance(body, dict) and "client_order_id" in body
    yield from _examine(name, "", message, _KNOWN_ENVELOPE, private=private)
    if isinstance(body, dict):
        yield from _examine(name, "msg.", body, known, private=private)
    elif body is not None and name != "ok":  # the answer to list_subscriptions is a list
        yield Key(CHANGED_TYPE, name, "msg"), _json_type(body), ""


def _examine(
    name: str,
    prefix: str,
    fields: Mapping[str, Any],
    known: Mapping[str, tuple[type, ...] | None],
    *,
    private: bool,
) -> Iterator[tuple[Key, str, str]]:
    for field_name, value in fields.items():
        if value is None:
            continue
        if field_name not in known:
            key = Key(UNKNOWN_FIELD, name, prefix + _name(field_name))
        else:
            kinds = known[field_name]
            if kinds is None or type(value) in kinds:
                continue
            key = Key(CHANGED_TYPE, name, prefix + field_name)
        yield key, _json_type(value), _example(field_name, value, private=private)


def _is_backfilled(message: Mapping[str, Any]) -> bool:
    """Whether it is a trade that was fetched by REST, whose fields are others."""
    return message["type"] == "trade" and "seq" not in message


def _object(frame: bytes) -> dict[str, Any] | None:
    """A frame with a type; None for anything else, and for a frame too large to decode, which is malformed."""
    if len(frame) > SNAPSHOT_BYTES:
        return None
    try:
        message = _decode(frame)
    except DecodeError:
        return None
    if isinstance(message, dict) and isinstance(message.get("type"), str):
        return message
    return None


def _place(frames: pl.DataFrame, row: int) -> Place:
    n, recv_ns, conn, sid = frames.select("n", "recv_ns", "conn", "sid").row(row)
    return Place(n, recv_ns, conn, sid or 0)


def _name(text: str) -> str:
    """A name from the wire, on one line and bounded."""
    return printable(text[:_NAME_CHARACTERS])


def _json_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), "null")


def _example(name: str, value: object, *, private: bool) -> str:
    """A value as JSON, bounded; only its size where it may be private."""
    if private or _SECRET.search(name) or isinstance(value, dict | list):
        size = f" of {len(value)}" if isinstance(value, str | list | dict) else ""
        return f"({_json_type(value)}{size})"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return printable(text[:_EXAMPLE_CHARACTERS])


NOT_EXAMINED = frozenset(
    [
        "fill",
        "market_position",
        "user_order",
        "order_group_updates",
        "rfq_created",
        "rfq_deleted",
        "quote_created",
        "quote_accepted",
        "quote_executed",
        "cfbenchmarks_value",
        "cfbenchmarks_value_5hz",
        "pyth_value",
    ]
)
"""Known types of channels that the recorder does not subscribe to."""
KNOWN_TYPES = NOT_EXAMINED | (_BODIES.keys() - {"orderbook_delta", "orderbook_snapshot"})
"""The types of frames that are stored under their own name in stream_events; all others are `unknown`."""
