"""From a fuzzer's bytes to inputs that are nearly right: garbage alone seldom gets past a parser's door.

Bytes that begin with an odd one are taken as they are. Those that begin with an even one are a script:
take a seed, change some of its values to nasty ones, and go on with the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

MARKET_ID = "9b0f6b43-5b68-4f9f-9f02-9a2d1b8ac1a1"

FRAMES: Sequence[dict[str, Any]] = [
    {
        "type": "orderbook_snapshot",
        "sid": 1,
        "seq": 1,
        "sending_ts_ms": 1795970362731,
        "msg": {
            "market_ticker": "A-1",
            "market_id": MARKET_ID,
            "clock": 3980944,
            "yes_dollars_fp": [["0.0800", "300.00"], ["0.2200", "333.50"]],
            "no_dollars_fp": [["0.5400", "20.00"], ["0.5600", "146.00"]],
        },
    },
    {
        "type": "orderbook_delta",
        "sid": 1,
        "seq": 2,
        "sending_ts_ms": 1795970362732,
        "msg": {
            "market_ticker": "A-1",
            "market_id": MARKET_ID,
            "clock": 3980945,
            "price_dollars": "0.0800",
            "delta_fp": "-54.00",
            "side": "yes",
            "ts": "2026-08-07T06:46:28.97871Z",
            "ts_ms": 1786085188978,
            "client_order_id": "own",
            "subaccount": 3,
        },
    },
    {  # as it was before March 2026
        "type": "orderbook_delta",
        "sid": 1,
        "seq": 3,
        "msg": {"market_ticker": "A-1", "price": 96, "delta": -54, "side": "no"},
    },
    {
        "type": "orderbook_snapshot",
        "sid": 1,
        "seq": 4,
        "msg": {
            "market_ticker": "B-2",
            "market_id": "",
            "yes": [[8, 300], [22, 333]],
            "no_dollars": [["0.540", 20], ["0.560", 146]],
        },
    },
    {"type": "subscribed", "id": 1, "msg": {"channel": "orderbook_delta", "sid": 1}},
    {"type": "ok", "id": 2, "sid": 1, "seq": 5, "msg": {"market_tickers": ["A-1", "B-2"]}},
    {"type": "ok", "id": 3, "msg": [{"channel": "orderbook_delta", "sid": 1}]},
    {"type": "unsubscribed", "id": 102, "sid": 2, "seq": 7},
    {
        "type": "error",
        "id": 1,
        "sid": 1,
        "seq": 6,
        "msg": {"code": 14, "msg": "Market Ticker required"},
    },
    {
        "type": "trade",
        "sid": 2,
        "seq": 1,
        "sending_ts_ms": 1795970362733,
        "msg": {
            "trade_id": MARKET_ID,
            "market_ticker": "A-1",
            "yes_price_dollars": "0.3600",
            "no_price_dollars": "0.6400",
            "count_fp": "136.00",
            "taker_side": "no",
            "ts": 1785999999,
            "ts_ms": 1785999999123,
        },
    },
    {
        "type": "fill",
        "sid": 3,
        "msg": {"market_ticker": "A-1", "order_id": "o", "count_fp": "1.00"},
    },
    {
        "type": "market_lifecycle_v2",
        "sid": 4,
        "seq": 1,
        "msg": {"market_ticker": "A-1", "event_type": "created"},
    },
]

NASTY = [
    *("null", "true", "0", "-1", "1", "4294967295", "4294967296", "18446744073709551615"),
    *(
        "18446744073709551616",
        "-9223372036854775809",
        "1" + "0" * 40,
        "1.0",
        "0.4800",
        "1e2",
        "1e400",
    ),
    *(
        '""',
        '"yes"',
        '"no"',
        '"0.4800"',
        '"0.48"',
        '"1.0000"',
        '"1.0001"',
        '"-0.0100"',
        '"0.00001"',
    ),
    *('"300.00"', '"-300.00"', '"0.00"', '"12.345"', '"99999999999999.99"', '"100000000000000.00"'),
    *('"9999999999999999.99"', '"99999999999999999999999.00"', '"1e999999999"', '"1E-999999999"'),
    *(
        '"NaN"',
        '"Infinity"',
        '"1_000.00"',
        '" 1.00"',
        '"+1.00"',
        '"\u0661.\u0660\u0660\u0660\u0660"',
        '"0x10"',
        '"1."',
        '".5"',
    ),
    *("[]", "{}", "[[]]", '[["0.1000"]]', '[["0.1000","1.00","x"]]', "[[0.1234,12.25]]", "[null]"),
    *(
        '[["0.1000","1.00"],["0.1000","2.00"]]',
        '[["0.1000",null]]',
        "[" * 2000 + "]" * 2000,
        '"\\ud800"',
    ),
    *(
        '"\\u0000"',
        '"\\n"',
        '"é"',
        f'"{MARKET_ID.upper()}"',
        '"{9b0f6b435b684f9f9f029a2d1b8ac1a1}"',
    ),
    *('"2026-08-07T06:46:28Z"', '"2026-08-07T06:46:60Z"', '"2026-08-07T06:46:28.9787123456Z"'),
    *(
        '"2026-08-07T06:46:28.97871+05:30"',
        '"2026-08-07"',
        '"0001-01-01T00:00:00Z"',
        '"20260807T064628Z"',
    ),
    *(
        '"9999-12-31T23:59:59.999999Z"',
        '"2026-13-07T06:46:28Z"',
        '"2026-08-07T06:46:28"',
        "253402300800000",
    ),
    *(
        '"orderbook_delta"',
        '"orderbook_snapshot"',
        '"error"',
        '"subscribed"',
        '"A-1"',
        '"B-2"',
        "10",
        "25",
    ),
]
"""Tokens of JSON, some of them not JSON at all."""

SEPARATOR = b"\n\n"
MOST_FRAMES = 40


def frames(data: bytes) -> list[bytes]:
    """A few frames."""
    if not data or data[0] & 1:
        return [frame for frame in data[1:].split(SEPARATOR)[:MOST_FRAMES] if frame]
    return list(_scripted(data[1:]))


def script(*steps: tuple[int, Sequence[tuple[int, int]]]) -> bytes:
    """The bytes that `frames` reads as: these seeds, with these (place, nasty value) changes."""
    return b"\0" + b"".join(
        bytes([seed, len(changes), *(byte for change in changes for byte in change)])
        for seed, changes in steps
    )


def _scripted(data: bytes) -> Iterator[bytes]:
    numbers = iter(data)
    for _, seed in zip(range(MOST_FRAMES), numbers, strict=False):
        frame = json.loads(json.dumps(FRAMES[seed % len(FRAMES)]))
        nasty: list[str] = []
        for _ in range(next(numbers, 0) % 5):
            where, what = next(numbers, 0), next(numbers, 0)
            places = list(_places(frame)) or [(frame, "type")]
            container, key = places[where % len(places)]
            if what == 255:
                container.pop(key, None) if isinstance(container, dict) else container.pop(key)
            else:
                container[key] = f"@{len(nasty)}@"
                nasty.append(NASTY[what % len(NASTY)])
        text = json.dumps(frame, separators=(",", ":"), ensure_ascii=False)
        for number, token in enumerate(nasty):
            text = text.replace(f'"@{number}@"', token)
        yield text.encode(errors="surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
