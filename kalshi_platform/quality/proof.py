"""Prove that journal, ClickHouse and archive hold the same rows, and every number of every subscription.

The three are tallied (`tally`), the journal as far as it is kept, and compared up to the record that both
stores have loaded; later records are ignored. For each subscription and store:

    missing         numbers that the journal or the other store has, and that this one must have
    unexplained     numbers that it does not have, and that none of its gap rows names
    missing levels  levels of snapshots that it lacks
    doubled         rows that it has more than once
    repeated        numbers that the exchange itself sent again: no fault

Sequence numbers start at 1. When the first numbers may be missing is as in lossless_proof.sql: in ClickHouse if
retention has deleted them, in the archive never, and in a given span of hours if the subscription started
before it. What cannot be compared any more is listed in `unjudged`. This module only reads; `restore` repairs.
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
from kalshi_platform.exchange.columnar_numbers import NumberSet, gaps_between, merge_ranges
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal import reader as journal
from kalshi_platform.journal.journal_identity import LaterVersion
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.loading import cursor as cursor_file
from kalshi_platform.loading import hot_hour
from kalshi_platform.quality import continuity, tally_journal, tally_stores
from kalshi_platform.quality.tally import Holdings, Subscription, Tally
from kalshi_platform.quality.tally_journal import Journal
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour

log = logging.getLogger(__name__)

CLICKHOUSE, PARQUET = "clickhouse", "parquet"
Span = tuple[datetime, datetime]
"""The first and the last hour."""
TRIES = 3
"""How often an hour is read that is compacted or rebuilt meanwhile."""
RANGES_SHOWN = 20
_READ = (ORDERBOOK_EVENTS.name, TRADES.name, STREAM_EVENTS.name)
Progress = Callable[[str, int, int], None]
"""(what is read, progress, total)"""


class Counts(msgspec.Struct):
    """Counts of the journal or a store, of one subscription or of all."""

    frames: int = 0
    """Distinct sequence numbers."""
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
        """Whether nothing is missing, unexplained or doubled."""
        return not (self.missing or self.unexplained or self.missing_levels or self.doubled)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) + getattr(other, n) for n in self.__struct_fields__))


class SubscriptionProof(msgspec.Struct):
    """The result for one subscription. A journal or store without its numbers is left out."""

    conn_id: str
    sid: int
    first: int
    """The first number that counts."""
    last: int
    journal: Counts | None = None
    stores: dict[str, Counts] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    """By store, the first ranges of numbers that it lacks: (first, last)."""

    @property
    def is_whole(self) -> bool:
        """Whether every store has all of it."""
        return all(counts.is_whole for counts in self.stores.values())


class JournalProof(msgspec.Struct):
    """The result for one shard's journal."""

    shard: int
    first_record: int
    """Records before it were pruned."""
    end_record: int
    """The record that every store has reached; the comparison ends here."""
    lost_records: int
    missing_records: dict[str, int]
    """By store, records before `end_record` without any row; numbered ones are also among `missing`."""


class Proof(msgspec.Struct):
    """The result of a proof."""

    since: str
    until: str
    journals: list[JournalProof]
    journal: Counts
    stores: dict[str, Counts]
    subscriptions: list[SubscriptionProof]
    unjudged: list[str]
    """What could not be compared, and why, as sentences."""
    failed: list[str]
    """What could not be read, as sentences."""

    @property
    def is_whole(self) -> bool:
        """Whether every store has everything that could be compared."""
        records = any(sum(read.missing_records.values()) for read in self.journals)
        return not records and all(found.is_whole for found in self.subscriptions)

    @property
    def verdict(self) -> str:
        """`whole`, `not whole`, or `not judged` if something could not be read."""
        if not self.is_whole:
            return "not whole"
        read_something = self.journal.frames or any(c.frames for c in self.stores.values())
        return "not judged" if self.failed or not read_something else "whole"


class _Cursor(msgspec.Struct):
    """The fields of a loader's cursor that are used."""

    committed: tuple[int, int, int]


@dataclass
class _Read:
    """The tallies. `recent`: rows that retention cannot have deleted, so that ClickHouse must have them, too."""

    journal: Holdings = field(default_factory=Holdings)
    recent_journal: Holdings = field(default_factory=Holdings)
    hot: Holdings | None = None
    cold: Holdings | None = None
    recent_cold: Holdings = field(default_factory=Holdings)
    taken_before: datetime | None = None
    """Receive time before which retention may have deleted rows of ClickHouse."""
    open: frozenset[str] = frozenset()
    """Connections that start after the compared records: their rows are still being loaded."""


def prove(settings: Settings, archive: Archive, span: Span | None, progress: Progress) -> Proof:
    """Tally everything, or the hours of `span`, and compare.

    A journal or store that cannot be read is named in the proof, and the others are still compared.
    """
    reading = _Reading(settings, archive, span, progress)
    with ExitStack() as held:
        client = reading.connected(held)
        reading.journals()
        reading.limit_to_sealed_hours()
        if client is not None:
            reading.clickhouse(client)
        reading.parquet()
        reading.find_open_connections()
    return reading.judged()


class _Reading:
    """A proof in progress."""

    def __init__(
        self, settings: Settings, archive: Archive, span: Span | None, progress: Progress
    ) -> None:
        self._settings = settings
        self._archive = archive
        self._span = span
        self._progress = progress
        self._places = _Read()
        self._journals: list[Journal] = []
        self._loaded_cold = False
        """Whether a loader has written to the archive."""
        self._hot_from: datetime | None = None
        """The first hour of which retention cannot have deleted anything."""
        self._limit: datetime | None = None
        """The last hour that is compared if there is no journal; None: all."""
        self._looked_at: set[datetime] = set()
        self._unjudged: list[str] = []
        self._failed: list[str] = []

    # -- reading -------------------------------------------------------------------------------

    def connected(self, held: ExitStack) -> clickhouse.Client | None:
        """Connect to ClickHouse and note what retention leaves there; None if it cannot be read."""
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
        """Tally each shard's journal up to the record that every store has reached."""
        for shard in watermarks.shards(self._settings.journals_dir):
            folder = self._settings.journal_dir(shard)
            try:
                _require_known_format(folder)
                committed = {n: _committed(folder, n) for n in sorted(self._settings.stores)}
                end = min(committed.values())
                self._loaded_cold |= committed.get(PARQUET, 0) > journal.oldest_offset(folder).n
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
            self._places.journal.update(read.held)
            self._places.recent_journal.update(read.recent)
            self._report_unjudged(read, committed)

    def _in_journal(self, shard: int, end: int, n: int) -> None:
        self._progress(f"journal {shard}", n, end)

    def _report_unjudged(self, read: Journal, committed: Mapping[str, int]) -> None:
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

    def limit_to_sealed_hours(self) -> None:
        """Without a journal, how far the stores are loaded is unknown: compare sealed hours alone."""
        if self._journals or self._failed:
            return
        sealed = [h for h in self._archived_hours() if self._is_sealed(h)]
        self._limit = max(sealed, default=None)
        self._unjudged.append(
            f"There is no journal in {self._settings.journals_dir}: the stores are held against each other"
            + (f", up to the sealed hour {self._limit:%Y-%m-%d %H:00} UTC." if self._limit else ".")
        )

    def clickhouse(self, client: clickhouse.Client) -> None:
        """Tally ClickHouse, hour by hour."""
        place = Holdings()
        try:
            wanted = [
                h
                for h in hot_hour.hours(client, [DATASETS[name] for name in _READ])
                if self._is_wanted(h) and (self._hot_from is None or h >= self._hot_from)
            ]
            for done, hour in enumerate(wanted, 1):
                place.update(tally_stores.hot(client, hour))
                place.compress_idle()
                self._looked_at.add(hour)
                self._progress(CLICKHOUSE, done, len(wanted))
        except StoreError as error:
            self._failed.append(f"ClickHouse: {error}")
            return
        self._places.hot = place

    def parquet(self) -> None:
        """Tally the archive, hour by hour; a file that cannot be read is named, and its rows count as missing."""
        place = Holdings()
        try:
            self._require_archive()
            wanted = [h for h in self._archived_hours() if self._is_wanted(h)]
            for done, hour in enumerate(wanted, 1):
                found = self._cold_hour(hour)
                if found is None:
                    continue
                place.update(found)
                place.compress_idle()
                if self._hot_from is None or hour >= self._hot_from:
                    self._places.recent_cold.update(found)
                    self._places.recent_cold.compress_idle()
                self._looked_at.add(hour)
                self._progress(PARQUET, done, len(wanted))
        except StoreError as error:
            self._failed.append(f"The archive: {error}")
            return
        self._places.cold = place

    def _require_archive(self) -> None:
        """Raise `StoreError` for a later version's archive, and if there is none although a loader wrote to it."""
        if self._archive.identity() is None and self._loaded_cold and self._archive.is_empty():
            raise archive_identity.archive_gone(str(self._archive), None)

    def _cold_hour(self, hour: datetime) -> Holdings | None:
        for tries_left in reversed(range(TRIES)):
            try:
                return tally_stores.cold(self._archive, hour)
            except StoreUnavailable:  # compacted or rebuilt meanwhile
                if not tries_left:
                    raise
            except StoreRefused as error:
                self._failed.append(f"The archive: {error}")
                return None
        return None

    def find_open_connections(self) -> None:
        """Find connections that start after the compared records: a store may have some of their rows."""
        later: set[str] = set()
        for read in self._journals:
            folder = self._settings.journal_dir(read.shard)
            try:
                later |= tally_journal.connections(folder, read.end)
            except (JournalError, OSError) as error:
                self._failed.append(f"The journal of shard {read.shard}: {error}")
        known = {
            conn for conn, _ in self._places.journal.subscriptions
        } | self._places.journal.opened
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

    # -- comparing -----------------------------------------------------------------------------

    def judged(self) -> Proof:
        """Compare the tallies; return the proof."""
        places = self._places
        keys = {
            key
            for place in (places.journal, places.hot, places.cold)
            if place is not None
            for key, tally in place.subscriptions.items()
            if tally.rows and key[0] not in places.open
        }
        subscriptions = [self._of_subscription(key) for key in sorted(keys)]
        stores: dict[str, Counts] = {}
        for name, place in ((CLICKHOUSE, places.hot), (PARQUET, places.cold)):
            if place is not None:
                counts = (s.stores[name] for s in subscriptions if name in s.stores)
                stores[name] = sum(counts, Counts())
        begin, end = min(self._looked_at, default=None), max(self._looked_at, default=None)
        return Proof(
            since=begin.isoformat() if begin else "",
            until=(end + HOUR).isoformat() if end else "",
            journals=[self._of_journal(read) for read in self._journals],
            journal=sum((s.journal for s in subscriptions if s.journal), Counts()),
            stores=stores,
            subscriptions=subscriptions,
            unjudged=self._unjudged,
            failed=self._failed,
        )

    def _of_subscription(self, key: Subscription) -> SubscriptionProof:
        places = self._places
        journalled = places.journal.subscriptions.get(key)
        known = key[0] in places.journal.opened or any(
            c == key[0] for c, _ in places.journal.subscriptions
        )
        last = journalled.seqs.last if journalled and journalled.rows else 0
        bound = last + 1 if known else None  # an open connection has later rows
        found = SubscriptionProof(key[0], key[1], 1, last)
        if journalled is not None and journalled.rows:
            found.journal = _kinds(journalled)
        for name, place, others in (
            (CLICKHOUSE, places.hot, (places.recent_journal, places.recent_cold)),
            (PARQUET, places.cold, (places.journal, places.hot or Holdings())),
        ):
            if place is None:
                continue
            counts, first, ranges = self._of_store(key, name, place, others, bound)
            if counts is None:
                continue
            found.stores[name] = counts
            found.first = first
            if ranges:
                found.ranges[name] = ranges
            if place.subscriptions[key].rows:
                found.last = max(found.last, place.subscriptions[key].seqs.last)
        return found

    def _of_store(
        self,
        key: Subscription,
        name: str,
        place: Holdings,
        others: Sequence[Holdings],
        bound: int | None,
    ) -> tuple[Counts | None, int, list[tuple[int, int]]]:
        """Return (a store's counts of a subscription, the first number that counts, the first ranges that it lacks)."""
        tally = place.subscriptions.get(key, Tally())
        wanted = NumberSet()
        for other in others:
            if (tallied := other.subscriptions.get(key)) is not None:
                wanted.update(tallied.seqs)
        seqs = tally.seqs
        if bound is not None:
            wanted, within = wanted.before(bound), seqs.before(bound)
        else:
            within = seqs
        if not wanted and not within:
            return None, 1, []
        every = NumberSet()
        every.update(wanted)
        every.update(within)
        first = self._first(key, name, (place, *others), every.first)
        upper = within.last + 1 if within else first
        named = merge_ranges((max(a, first), min(b, upper)) for a, b in tally.gaps)
        named_holes = sum(b - a - within.count(a, b) for a, b in named)
        counts = _kinds(tally)
        counts.frames = len(within)
        counts.missing = len(wanted.difference(within))
        counts.holes = max(upper - first - within.count(first, upper), 0)
        counts.named_holes = named_holes
        counts.unexplained = counts.holes - named_holes
        counts.missing_levels = tally.missing_levels
        counts.doubled = tally.doubled
        counts.repeated = tally.repeated
        if not (counts.missing or counts.unexplained):
            return counts, first, []
        explained = merge_ranges([*within.runs(), *named])
        lacks = gaps_between(explained, first, every.last + 1)
        return counts, first, [(a, b - 1) for a, b in islice(lacks, RANGES_SHOWN)]

    def _first(self, key: Subscription, name: str, places: Sequence[Holdings], least: int) -> int:
        """Return the first number of a subscription that counts in a store."""
        if any(key[0] in p.opened or ((t := p.subscriptions.get(key)) and t.begun) for p in places):
            return 1
        if self._span is not None:
            return least  # it started before the span
        begins = min((at for p in places if (at := p.begins(key[0]))), default=None)
        taken = self._places.taken_before
        if name == CLICKHOUSE and taken and begins and begins <= taken + timedelta(days=1):
            return least
        return 1

    def _of_journal(self, read: Journal) -> JournalProof:
        missing = {}
        for name, place, journalled in (
            (CLICKHOUSE, self._places.hot, read.recent),
            (PARQUET, self._places.cold, read.held),
        ):
            if place is None:
                continue
            if any(
                t.unplaced
                for key, t in place.subscriptions.items()
                if key in journalled.subscriptions
            ):
                self._unjudged.append(
                    f"Shard {read.shard}: {name} has rows of a version that kept no record numbers; frames"
                    " without a number of the exchange are not compared there."
                )
                continue
            missing[name] = len(
                journalled.records[read.shard].difference(place.records[read.shard])
            )
        return JournalProof(read.shard, read.first, read.end, read.lost_records, missing)


def _require_known_format(folder: Path) -> None:
    """Raise `LaterVersion` for a journal of a later version; its identity is irrelevant here."""
    try:
        journal_identity.read(folder)
    except LaterVersion:
        raise
    except JournalError as error:
        log.warning("%s", error)


def _committed(folder: Path, store: str) -> int:
    """Return the record up to which a store has loaded a journal; the journal's first record if nothing was loaded."""
    path = folder / "load" / f"{store}.json"
    beginning = journal.oldest_offset(folder).n
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
