"""Which drift of the wire becomes rows: `unknown_field`, once per finding and day.

`exchange.drift` finds, in each range, what frames have that is not known and what they lack. Here the state decides
what was reported already: it is a part of the book state, so that an hour that is built again has the same rows.
A field is missing once frames of its type had it. After a state of an earlier version the drift is reported from the
next hour on, at which every loader begins a range.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from kalshi_platform.exchange.drift import MOST_FINDINGS, OTHERS, Drift, Finding, Key

KIND = "unknown_field"
_DAY_NS = 86_400_000_000_000


class WireState(msgspec.Struct, frozen=True):
    """What is known of the wire between two ranges."""

    seen: frozenset[str] = frozenset()
    """The expected fields that frames had, as keys of their absence."""
    day: int = -1
    """Days since the epoch, of the latest finding."""
    reported: frozenset[str] = frozenset()
    """The findings that have a row of that day."""


def rows(drift: Drift, state: WireState) -> tuple[list[tuple[Any, ...]], WireState]:
    """Return (the rows of a range's findings that have none of their day yet, the state after it)."""
    found = []
    day, reported = state.day, set(state.reported)
    for found_key, finding in _in_order(drift, state):
        key = found_key
        if finding.place.recv_ns // _DAY_NS != day:
            day = finding.place.recv_ns // _DAY_NS
            reported = set()
        if str(key) in reported:
            continue
        if len(reported) >= MOST_FINDINGS:
            key = Key(key.what, OTHERS, OTHERS)
            if str(key) in reported:
                continue
        reported.add(str(key))
        found.append(_row(key, finding))
    present = {str(key) for key, each in drift.presence.items() if each.present is not None}
    seen = state.seen if present <= state.seen else state.seen | present
    if not found and seen is state.seen:
        return found, state
    return found, WireState(seen, day, frozenset(reported))


def counts(drift: Drift, state: WireState) -> dict[str, int]:
    """In how many frames of a range each finding was."""
    return {str(key): finding.count for key, finding in _in_order(drift, state)}


def _in_order(drift: Drift, state: WireState) -> Iterator[tuple[Key, Finding]]:
    """All findings of a range in the order of their records, missing fields included."""
    found = list(drift.findings.items())
    for key, presence in drift.presence.items():
        place = presence.absent if str(key) in state.seen else presence.absent_after
        if place is not None:
            found.append((key, Finding(place, "", "", presence.count)))
    yield from sorted(found, key=lambda item: (item[1].place.n, item[0]))


def _row(key: Key, finding: Finding) -> tuple[Any, ...]:
    detail = {"what": key.what, "type": key.type, "path": key.path}
    detail |= {"found": finding.found} if finding.found else {}
    detail |= {"example": finding.example} if finding.example else {}
    place = finding.place
    body = msgspec.json.encode(detail).decode()
    return (place.n, place.recv_ns, place.conn, place.sid, 0, KIND, "", body)
