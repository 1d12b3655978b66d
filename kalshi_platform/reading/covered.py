"""What the archive has of some markets in a span: the hours with files, and when each book was synced.

A sealed hour's manifest says how many seconds of it each book was synced. Where that is the whole hour, nothing else is
read; otherwise the spans follow from the hour's events (`archive.coverage`).
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import groupby, pairwise

from kalshi_platform.archive import Archive, Listed, Manifest, hours
from kalshi_platform.archive.coverage import Span
from kalshi_platform.errors import NotCovered
from kalshi_platform.reading.arguments import MICROSECOND
from kalshi_platform.reading.rows import for_each, manifest
from kalshi_platform.schema import RECORDED
from kalshi_platform.utc_hours import HOUR, floor_hour

WHOLE_S = HOUR.total_seconds()
LOOKED_BACK = 48
"""Hours whose manifests are asked for names that are like an unknown one."""


class Condition(StrEnum):
    """What is known of a book over a span."""

    SYNCED = "synced"
    """It is the exchange's."""
    STALE = "stale"
    """Something was lost, and its next snapshot had not come yet; or the recorder was not running."""
    MISSING = "missing"
    """The archive has nothing of the market."""


@dataclass(frozen=True)
class Period:
    """A part of a span in which a book has one condition."""

    start: datetime
    end: datetime
    condition: Condition


@dataclass(frozen=True)
class RecordedHour:
    """An hour of which the archive has rows of books, as it was listed."""

    hour: datetime
    listed: Mapping[str, Listed]
    """By dataset of `BOOKS_FROM`; those with files alone."""
    manifests: Mapping[str, Manifest]
    """Of the datasets that books are rebuilt from, if all that there are have one: the hour is sealed. Else empty."""

    @property
    def sealed(self) -> bool:
        """Whether the hour gets no more rows."""
        return bool(self.manifests)

    @property
    def content(self) -> str:
        """What a dataset computed from this hour must name as its origin; "" if it is not sealed."""
        return hours.content_of(self.manifests.values())


def recorded_hours(archive: Archive, start: datetime, end: datetime) -> list[RecordedHour]:
    """List the hours of a span of which the archive has rows of books, ascending.

    Raises: `StoreRefused` for a damaged manifest, and what the store raises.
    """
    first, last = floor_hour(start), floor_hour(end - MICROSECOND)
    names = hours.BOOKS_FROM
    listings = dict(
        zip(names, for_each(archive, lambda n: archive.listing(n, first, last), names), strict=True)
    )
    found = [
        (hour, {n: at[hour] for n, at in listings.items() if hour in at and at[hour].files})
        for hour in sorted({hour for at in listings.values() for hour in at})
    ]
    found = [(hour, listed) for hour, listed in found if listed]
    manifests = for_each(archive, lambda one: _manifests(archive, *one), found)
    return [RecordedHour(*one, of) for one, of in zip(found, manifests, strict=True)]


def _manifests(
    archive: Archive, hour: datetime, listed: Mapping[str, Listed]
) -> Mapping[str, Manifest]:
    files = {name: one.manifest for name, one in listed.items() if one.manifest is not None}
    if len(files) < len(listed):
        return {}
    found = {name: manifest(archive, name, hour, file.version) for name, file in files.items()}
    complete = {name: m for name, m in found.items() if m is not None and m.complete}
    return complete if len(complete) == len(listed) else {}


def conditions(
    archive: Archive,
    there: Sequence[RecordedHour],
    tickers: Sequence[str],
    start: datetime,
    end: datetime,
) -> dict[str, list[Period]]:
    """Find the conditions of each market's book from `start` to `end`, without a hole and each as long as it lasts."""
    of_hours = for_each(archive, lambda one: _of_hour(archive, one, tickers), there)
    found = {}
    for ticker in tickers:
        known = [period for of in of_hours for period in of.get(ticker, ())]
        known += _until_checkpoints(there, [of.get(ticker, []) for of in of_hours])
        found[ticker] = list(_joined(_clipped(known, start, end), start, end))
    return found


def _of_hour(
    archive: Archive, there: RecordedHour, tickers: Sequence[str]
) -> dict[str, list[Period]]:
    hour, end = there.hour, there.hour + HOUR
    seconds: Mapping[str, float] = {}
    for of_dataset in there.manifests.values():
        seconds = of_dataset.verified_by_market
    whole = {ticker for ticker in tickers if seconds.get(ticker, 0.0) >= WHOLE_S}
    found = {ticker: [Period(hour, end, Condition.SYNCED)] for ticker in whole}
    rest = [
        ticker for ticker in tickers if ticker not in whole and (ticker in seconds or not seconds)
    ]
    if rest:
        covered = hours.covered(archive, hour, rest, complete=there.sealed)
        for ticker in rest:
            if ticker in covered.followed:
                followed = Period(*covered.followed[ticker], Condition.STALE)
                synced = [Period(*span, Condition.SYNCED) for span in covered.synced[ticker]]
                found[ticker] = [*synced, followed]
    return found


def _until_checkpoints(
    there: Sequence[RecordedHour], of_hours: Sequence[Sequence[Period]]
) -> Iterator[Period]:
    """Cover the end of an hour that is not sealed, where the next hour's checkpoint shows the book synced.

    A checkpoint is verified only where its connection was alive, and is written after what came before it.
    """
    for (one, own), (after, later) in pairwise(zip(there, of_hours, strict=True)):
        synced = [period.end for period in own if period.condition is Condition.SYNCED]
        begins = [s.start for s in later if s.condition is Condition.SYNCED]
        follows = after.hour == one.hour + HOUR and after.hour in begins
        if not one.sealed and synced and follows:
            yield Period(max(synced), after.hour, Condition.SYNCED)


def _clipped(known: Iterable[Period], start: datetime, end: datetime) -> Iterator[Period]:
    for period in known:
        begins, ends = max(period.start, start), min(period.end, end)
        if begins < ends:
            yield Period(begins, ends, period.condition)


def _joined(known: Iterable[Period], start: datetime, end: datetime) -> Iterator[Period]:
    """Fill what is between the periods, and join neighbours: synced wins over stale, stale over missing."""
    known = list(known)
    edges = sorted({start, end, *(s.start for s in known), *(s.end for s in known)})
    over = {
        condition: _merged((s.start, s.end) for s in known if s.condition is condition)
        for condition in (Condition.SYNCED, Condition.STALE)
    }

    def at(instant: datetime) -> Condition:
        return next((c for c, spans in over.items() if _within(spans, instant)), Condition.MISSING)

    for condition, run in groupby(pairwise(edges), key=lambda edge: at(edge[0])):
        parts = list(run)
        yield Period(parts[0][0], parts[-1][1], condition)


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for begins, ends in sorted(spans):
        if merged and begins <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(ends, merged[-1][1]))
        else:
            merged.append((begins, ends))
    return merged


def _within(spans: Sequence[Span], instant: datetime) -> bool:
    n = bisect_right(spans, instant, key=lambda span: span[0])
    return n > 0 and instant < spans[n - 1][1]


# -- refusing ----------------------------------------------------------------------------------


def require(
    archive: Archive,
    there: Sequence[RecordedHour],
    found: Mapping[str, Sequence[Period]],
    *,
    allow_gaps: bool,
) -> None:
    """Refuse a span of which the archive has nothing; without `allow_gaps` also one with a part that is not synced.

    Raises:
        NotCovered: The sentence names the market, the part, and what can be asked instead.
    """
    for ticker, periods in found.items():
        start, end = periods[0].start, periods[-1].end
        if all(period.condition is Condition.MISSING for period in periods):
            raise NotCovered(_nothing_of(archive, there, ticker, start, end))
        bad = [s for s in periods if s.condition is not Condition.SYNCED]
        if allow_gaps or not bad:
            continue
        total = sum((s.end - s.start for s in bad), timedelta())
        first, more = bad[0], f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        good = [s for s in periods if s.condition is Condition.SYNCED]
        longest = max(good, key=lambda s: s.end - s.start, default=None)
        instead = f"Ask for {_shown(longest.start, longest.end)}, or pass" if longest else "Pass"
        raise NotCovered(
            f"The book of {ticker} is not covered for {total} of {_shown(start, end)}: {first.condition} from"
            f" {_shown(first.start, first.end)}{more}. {instead} allow_gaps=True, which marks such rows."
        )


def _nothing_of(
    archive: Archive, there: Sequence[RecordedHour], ticker: str, start: datetime, end: datetime
) -> str:
    if not there:
        recorded = sorted({h for dataset in RECORDED for h in archive.hours(dataset.name)})
        if not recorded:
            return f"{archive} has no recorded hour. Give the folder or URL that PARQUET_DIR names."
        return (
            f"Nothing is recorded of {_shown(start, end)} in {archive}. It has hours of"
            f" {_shown(recorded[0], recorded[-1] + HOUR)}: ask for a span of these."
        )
    known = known_tickers(archive, there)
    if ticker in known:
        return (
            f"{ticker} has no book in {_shown(start, end)} in {archive}: no snapshot of it was received. Ask for another"
            " span; `coverage` says which hours have it."
        )
    like = difflib.get_close_matches(ticker, known, n=3, cutoff=0.6)
    names = " or ".join(like) if like else ", ".join(sorted(known)[:3])
    return (
        f"{ticker} is not recorded in {_shown(start, end)} in {archive}. Recorded are, among {len(known):,}: {names}."
        " Ask for one of these; `markets()` lists them."
    )


def known_tickers(archive: Archive, there: Sequence[RecordedHour]) -> set[str]:
    """The markets that the last `LOOKED_BACK` of these hours have."""
    found: set[str] = set()
    for one in there[-LOOKED_BACK:]:
        of_manifests = {t for m in one.manifests.values() for t in m.verified_by_market}
        found |= of_manifests or _tickers_of(archive, one)
    return found - {""}


def _tickers_of(archive: Archive, there: RecordedHour) -> set[str]:
    """The markets in an hour's rows, where no manifest names them."""
    found: set[str] = set()
    for name in there.listed:
        for table in archive.read(name, there.hour, ["market_ticker"]):
            found |= set(table["market_ticker"].unique().to_pylist())
    return found


def _shown(start: datetime, end: datetime) -> str:
    def one(at: datetime) -> str:
        whole, fraction = f"{at:%Y-%m-%d %H:%M:%S|%f}".split("|")
        return f"{whole}.{fraction}".rstrip("0").rstrip(".") if int(fraction) else whole

    return f"{one(start)} to {one(end)} UTC"
