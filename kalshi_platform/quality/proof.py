"""Do the journal, ClickHouse and the archive hold the same, and every number of every subscription?

The three are read and tallied (`tally`), the journal as far as it is kept, and compared up to the record
that both stores say they have: what comes meanwhile is not judged. Of each subscription and store:

    missing         numbers that another place has, and that this one must have
    unexplained     numbers that are nowhere in it, and that no gap row of it names
    missing levels  levels of snapshots that it lacks
    doubled         rows that it has more than once
    repeated        numbers that the exchange itself sent again: no fault

Numbers begin at 1. Where a beginning may be missing follows lossless_proof.sql: in ClickHouse where
retention is shown to have taken it, in the archive nowhere, and in a given span of hours where the
subscription began before it. What cannot be judged any more is said, in `unjudged`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec

from kalshi_platform import checked_json
from kalshi_platform.archive import Archive, archive_identity, hours, watermarks
from kalshi_platform.checked_json import CorruptFile, LaterFormat
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.exchange.columnar_numbers import Numbers, disjoint, gaps_between
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal import reader as journal
from kalshi_platform.journal.journal_identity import LaterVersion
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.loading import cursor as cursor_file
from kalshi_platform.loading import hot_hour
from kalshi_platform.quality import continuity, tally_journal, tally_stores
from kalshi_platform.quality.tally import Place, Subscription, Tally
from kalshi_platform.quality.tally_journal import Journal
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour

log = logging.getLogger(__name__)

CLICKHOUSE, PARQUET = "clickhouse", "parquet"
Span = tuple[datetime, datetime]
"""The first and the last hour."""
TRIES = 3
"""Times that an hour is read which is compacted or rebuilt under our eyes."""
RANGES_SHOWN = 20
_READ = (ORDERBOOK_EVENTS.name, TRADES.name, STREAM_EVENTS.name)
Progress = Callable[[str, int, int], None]
"""(what is read, how far, of how many)"""


class Counts(msgspec.Struct):
    """What a place holds of a subscription, or of all."""

    frames: int = 0
    """Different numbers."""
    deltas: int = 0
    trades: int = 0
    snapshots: int = 0
    others: int = 0
    missing: int = 0
    holes: int = 0
    named_holes: int = 0
    unexplained: int = 0
    missing_levels: int = 0
    doubled: int = 0
    repeated: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong with it."""
        return not (self.missing or self.unexplained or self.missing_levels or self.doubled)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) + getattr(other, n) for n in self.__struct_fields__))


class OfSubscription(msgspec.Struct):
    """What was found of one subscription. A place that has nothing to say of it is left out."""

    conn_id: str
    sid: int
    first: int
    """The number that is counted from."""
    last: int
    journal: Counts | None = None
    stores: dict[str, Counts] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    """By store, the first numbers that it lacks: from, to."""

    @property
    def is_whole(self) -> bool:
        """Whether every store has all of it."""
        return all(counts.is_whole for counts in self.stores.values())


class OfJournal(msgspec.Struct):
    """What there is of a shard's journal."""

    shard: int
    first_record: int
    """The records before it were pruned."""
    end_record: int
    """The record that every store has come to: up to here it was compared."""
    lost_records: int
    missing_records: dict[str, int]
    """By store, records before `end_record` that left no row at all; numbered ones are among `missing`."""


class Proof(msgspec.Struct):
    """What was found."""

    since: str
    until: str
    journals: list[OfJournal]
    journal: Counts
    stores: dict[str, Counts]
    subscriptions: list[OfSubscription]
    unjudged: list[str]
    """Sentences about what could not be compared, and why."""
    failed: list[str]
    """Sentences about what could not be read."""

    @property
    def is_whole(self) -> bool:
        """Whether every store has everything that could be judged."""
        records = any(sum(it.missing_records.values()) for it in self.journals)
        return not records and all(it.is_whole for it in self.subscriptions)

    @property
    def verdict(self) -> str:
        """`whole`, `not whole`, or `not judged` where something could not be read."""
        if not self.is_whole:
            return "not whole"
        read_something = self.journal.frames or any(c.frames for c in self.stores.values())
        return "not judged" if self.failed or not read_something else "whole"


class _Cursor(msgspec.Struct):
    """What is looked at of a loader's cursor."""

    committed: tuple[int, int, int]


@dataclass
class _Places:
    """What was read. `recent` is what ClickHouse must have, too: retention cannot have taken it."""

    journal: Place = field(default_factory=Place)
    recent_journal: Place = field(default_factory=Place)
    hot: Place | None = None
    cold: Place | None = None
    recent_cold: Place = field(default_factory=Place)
    taken_before: datetime | None = None
    """Receive time before which retention may have taken rows of ClickHouse."""
    open: frozenset[str] = frozenset()
    """Connections that begin behind what was compared: their rows are still coming."""


def prove(settings: Settings, archive: Archive, span: Span | None, progress: Progress) -> Proof:
    """Read everything, or the hours of `span`, and compare.

    A place that cannot be read is named in the proof, and the others are compared all the same.
    """
    reading = _Reading(settings, archive, span, progress)
    with ExitStack() as held:
        client = reading.connected(held)
        reading.journals()
        reading.without_journals()
        if client is not None:
            reading.clickhouse(client)
        reading.parquet()
        reading.what_came_meanwhile()
    return reading.judged()


class _Reading:
    """One proof under way."""

    def __init__(
        self, settings: Settings, archive: Archive, span: Span | None, progress: Progress
    ) -> None:
        self._settings = settings
        self._archive = archive
        self._span = span
        self._progress = progress
        self._places = _Places()
        self._journals: list[Journal] = []
        self._loaded_cold = False
        """Whether a load has written to the archive."""
        self._hot_from: datetime | None = None
        """The first hour that retention cannot have taken anything of."""
        self._limit: datetime | None = None
        """The last hour that is judged where no journal is here; None: all."""
        self._looked_at: set[datetime] = set()
        self._unjudged: list[str] = []
        self._failed: list[str] = []

    # -- reading -------------------------------------------------------------------------------

    def connected(self, held: ExitStack) -> clickhouse.Client | None:
        """A client of ClickHouse, and what retention leaves there; None where it cannot be read."""
        if not self._settings.use_clickhouse:
            self._unjudged.append("ClickHouse is not in use (USE_CLICKHOUSE=0).")
            return None
        try:
            client = held.enter_context(
                closing(clickhouse.connect(self._settings, log_comment="proof"))
            )
            taken = continuity.taken_before(client)
        except StoreError as error:
            self._failed.append(f"ClickHouse: {error}")
            return None
        if taken is not None:
            self._places.taken_before = taken
            self._hot_from = floor_hour(taken) + HOUR
            self._unjudged.append(
                f"ClickHouse's retention may have taken rows received before {taken:%Y-%m-%d %H:%M} UTC: it is"
                f" compared from {self._hot_from:%Y-%m-%d %H:00} on."
            )
        return client

    def journals(self) -> None:
        """Read each shard's journal up to the record that every store has come to."""
        for shard in watermarks.shards(self._settings.journals_dir):
            folder = self._settings.journal_dir(shard)
            try:
                _insist_on_known_format(folder)
                committed = {n: _committed(folder, n) for n in sorted(self._settings.stores)}
                end = min(committed.values())
                self._loaded_cold |= committed.get(PARQUET, 0) > journal.beginning(folder).n
                read = tally_journal.read(
                    folder,
                    shard,
                    end,
                    hours=self._span,
                    recent_from=self._hot_from,
                    progress=partial(self._in_journal, shard, end),
                )
            except (JournalError, OSError) as error:
                self._failed.append(f"The journal of shard {shard}: {error}")
                continue
            self._journals.append(read)
            self._places.journal.update(read.place)
            self._places.recent_journal.update(read.recent)
            self._say_what_is_left_of(read, committed)

    def _in_journal(self, shard: int, end: int, n: int) -> None:
        self._progress(f"journal {shard}", n, end)

    def _say_what_is_left_of(self, read: Journal, committed: Mapping[str, int]) -> None:
        if read.first:
            self._unjudged.append(
                f"Shard {read.shard}: the journal has pruned its records before {read.first:,}; the stores' rows"
                " of these are held against each other and against their numbers and gap rows."
            )
        if read.lost:
            self._unjudged.append(
                f"Shard {read.shard}: {read.lost_records:,} records of the journal cannot be read any more."
            )
        ahead = max(committed, key=lambda name: committed[name])
        for name, n in committed.items():
            if n < committed[ahead]:
                self._unjudged.append(
                    f"Shard {read.shard}: {name} has come to record {n:,} and {ahead} to {committed[ahead]:,}:"
                    " what is between is not compared yet."
                )

    def without_journals(self) -> None:
        """Where no journal is here, nobody says how far the stores are: sealed hours alone are judged."""
        if self._journals or self._failed:
            return
        sealed = [h for h in self._archived_hours() if self._is_sealed(h)]
        self._limit = max(sealed, default=None)
        self._unjudged.append(
            f"There is no journal in {self._settings.journals_dir}: the stores are held against each other"
            + (f", up to the sealed hour {self._limit:%Y-%m-%d %H:00} UTC." if self._limit else ".")
        )

    def clickhouse(self, client: clickhouse.Client) -> None:
        """Read ClickHouse, hour by hour."""
        place = Place()
        try:
            there = [
                h
                for h in hot_hour.hours(client, [DATASETS[name] for name in _READ])
                if self._is_wanted(h) and (self._hot_from is None or h >= self._hot_from)
            ]
            for done, hour in enumerate(there, 1):
                place.update(tally_stores.hot(client, hour))
                place.rest()
                self._looked_at.add(hour)
                self._progress(CLICKHOUSE, done, len(there))
        except StoreError as error:
            self._failed.append(f"ClickHouse: {error}")
            return
        self._places.hot = place

    def parquet(self) -> None:
        """Read the archive, hour by hour; a file that cannot be read is named, and its rows are missing."""
        place = Place()
        try:
            self._insist_on_the_archive()
            there = [h for h in self._archived_hours() if self._is_wanted(h)]
            for done, hour in enumerate(there, 1):
                found = self._cold_hour(hour)
                if found is None:
                    continue
                place.update(found)
                place.rest()
                if self._hot_from is None or hour >= self._hot_from:
                    self._places.recent_cold.update(found)
                    self._places.recent_cold.rest()
                self._looked_at.add(hour)
                self._progress(PARQUET, done, len(there))
        except StoreError as error:
            self._failed.append(f"The archive: {error}")
            return
        self._places.cold = place

    def _insist_on_the_archive(self) -> None:
        """Raise `StoreError` for a later version's, and where there is none, though a load wrote to it."""
        if self._archive.identity() is None and self._loaded_cold and self._archive.is_empty():
            raise archive_identity.gone(str(self._archive), None)

    def _cold_hour(self, hour: datetime) -> Place | None:
        for tries_left in reversed(range(TRIES)):
            try:
                return tally_stores.cold(self._archive, hour)
            except StoreUnavailable:  # compacted or rebuilt under our eyes
                if not tries_left:
                    raise
            except StoreRefused as error:
                self._failed.append(f"The archive: {error}")
                return None
        return None

    def what_came_meanwhile(self) -> None:
        """Which connections begin behind what was compared: their rows may be in a store in part."""
        later: set[str] = set()
        for read in self._journals:
            folder = self._settings.journal_dir(read.shard)
            try:
                later |= tally_journal.connections(folder, read.end)
            except (JournalError, OSError) as error:
                self._failed.append(f"The journal of shard {read.shard}: {error}")
        known = {conn for conn, _ in self._places.journal.of} | self._places.journal.opened
        self._places.open = frozenset(later - known)

    def _archived_hours(self) -> list[datetime]:
        return sorted({hour for name in _READ for hour in self._archive.hours(name)})

    def _is_sealed(self, hour: datetime) -> bool:
        try:
            return hours.is_sealed(self._archive, hour)
        except StoreRefused:  # a damaged manifest
            return False

    def _is_wanted(self, hour: datetime) -> bool:
        inside = self._span is None or self._span[0] <= hour <= self._span[1]
        return inside and (self._limit is None or hour <= self._limit)

    # -- judging -------------------------------------------------------------------------------

    def judged(self) -> Proof:
        """What was found."""
        places = self._places
        of = {
            key
            for place in (places.journal, places.hot, places.cold)
            if place is not None
            for key, tally in place.of.items()
            if tally.rows and key[0] not in places.open
        }
        subscriptions = [self._of_subscription(key) for key in sorted(of)]
        stores: dict[str, Counts] = {}
        for name, place in ((CLICKHOUSE, places.hot), (PARQUET, places.cold)):
            if place is not None:
                found = (it.stores[name] for it in subscriptions if name in it.stores)
                stores[name] = sum(found, Counts())
        begin, end = min(self._looked_at, default=None), max(self._looked_at, default=None)
        return Proof(
            since=begin.isoformat() if begin else "",
            until=(end + HOUR).isoformat() if end else "",
            journals=[self._of_journal(read) for read in self._journals],
            journal=sum((it.journal for it in subscriptions if it.journal), Counts()),
            stores=stores,
            subscriptions=subscriptions,
            unjudged=self._unjudged,
            failed=self._failed,
        )

    def _of_subscription(self, of: Subscription) -> OfSubscription:
        places = self._places
        journalled = places.journal.of.get(of)
        known = of[0] in places.journal.opened or any(c == of[0] for c, _ in places.journal.of)
        last = journalled.seqs.last if journalled and journalled.rows else 0
        bound = last + 1 if known else None  # of a connection that goes on, more is coming
        found = OfSubscription(of[0], of[1], 1, last)
        if journalled is not None and journalled.rows:
            found.journal = _kinds(journalled)
        for name, place, others in (
            (CLICKHOUSE, places.hot, (places.recent_journal, places.recent_cold)),
            (PARQUET, places.cold, (places.journal, places.hot or Place())),
        ):
            if place is None:
                continue
            counts, first, ranges = self._of_store(of, name, place, others, bound)
            if counts is None:
                continue
            found.stores[name] = counts
            found.first = first
            if ranges:
                found.ranges[name] = ranges
            if place.of[of].rows:
                found.last = max(found.last, place.of[of].seqs.last)
        return found

    def _of_store(
        self,
        of: Subscription,
        name: str,
        place: Place,
        others: Sequence[Place],
        bound: int | None,
    ) -> tuple[Counts | None, int, list[tuple[int, int]]]:
        """(what a store has of a subscription, the number that counts first, the first ranges it lacks)"""
        tally = place.of.get(of, Tally())
        wanted = Numbers()
        for other in others:
            if (its := other.of.get(of)) is not None:
                wanted.update(its.seqs)
        seqs = tally.seqs
        if bound is not None:
            wanted, within = wanted.up_to(bound), seqs.up_to(bound)
        else:
            within = seqs
        if not wanted and not within:
            return None, 1, []
        every = Numbers()
        every.update(wanted)
        every.update(within)
        first = self._first(of, name, (place, *others), every.first)
        upper = within.last + 1 if within else first
        named = disjoint((max(a, first), min(b, upper)) for a, b in tally.gaps)
        named_holes = sum(b - a - within.count(a, b) for a, b in named)
        counts = _kinds(tally)
        counts.frames = len(within)
        counts.missing = len(wanted.without(within))
        counts.holes = max(upper - first - within.count(first, upper), 0)
        counts.named_holes = named_holes
        counts.unexplained = counts.holes - named_holes
        counts.missing_levels = tally.missing_levels
        counts.doubled = tally.doubled
        counts.repeated = tally.repeated
        if not (counts.missing or counts.unexplained):
            return counts, first, []
        there = disjoint([*within.runs(), *named])
        lacks = gaps_between(there, first, every.last + 1)
        return counts, first, [(a, b - 1) for a, b in islice(lacks, RANGES_SHOWN)]

    def _first(self, of: Subscription, name: str, places: Sequence[Place], least: int) -> int:
        """The number that a subscription is counted from in a store."""
        if any(of[0] in p.opened or ((t := p.of.get(of)) and t.begun) for p in places):
            return 1
        if self._span is not None:
            return least  # it began before the span
        begins = min((at for p in places if (at := p.begins(of[0]))), default=None)
        taken = self._places.taken_before
        if name == CLICKHOUSE and taken and begins and begins <= taken + timedelta(days=1):
            return least
        return 1

    def _of_journal(self, read: Journal) -> OfJournal:
        missing = {}
        for name, place, journalled in (
            (CLICKHOUSE, self._places.hot, read.recent),
            (PARQUET, self._places.cold, read.place),
        ):
            if place is None:
                continue
            if any(t.unplaced for key, t in place.of.items() if key in journalled.of):
                self._unjudged.append(
                    f"Shard {read.shard}: {name} has rows of a version that kept no record numbers; frames"
                    " without a number of the exchange are not compared there."
                )
                continue
            missing[name] = len(journalled.records[read.shard].without(place.records[read.shard]))
        return OfJournal(read.shard, read.first, read.end, read.lost_records, missing)


def _insist_on_known_format(folder: Path) -> None:
    """Raise `LaterVersion` for a journal that a later version keeps; which journal it is, is no matter here."""
    try:
        journal_identity.read(folder)
    except LaterVersion:
        raise
    except JournalError as error:
        log.warning("%s", error)


def _committed(folder: Path, store: str) -> int:
    """The record up to which a store has a journal; its beginning where nothing was loaded."""
    path = folder / "load" / f"{store}.json"
    beginning = journal.beginning(folder).n
    try:
        cursor = checked_json.decode(
            path.read_bytes(), _Cursor, path, cursor_file.FORMAT, checksum_optional=True
        )
        return max(cursor.committed[2], beginning)
    except FileNotFoundError:
        return beginning
    except CorruptFile as error:
        raise JournalError(f"{path} is damaged ({error}).") from None
    except LaterFormat as error:
        raise JournalError(str(error)) from None


def _kinds(tally: Tally) -> Counts:
    deltas, trades, snapshots, others = tally.kinds
    counts = Counts(len(tally.seqs), deltas, trades, snapshots, others)
    counts.repeated = tally.repeated
    return counts
