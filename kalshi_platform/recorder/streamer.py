"""The streamer: capture and load of one shard, in threads of one process.

    capture (asyncio) ──▶ journal's writer ──▶ load into Parquet
                                          └──▶ load into ClickHouse

A shard that STREAM_SHARDS no longer has is only *drained*: what its journal still has is brought to the
stores, without a connection, and then it is done.

It is hosted by the `stream` command and by Dagster's `stream_orderbook`, which see only this class.
Once a second it reports its health, until its very end: `health/health_report.py` says where. The thread that does
so touches no disk; the copy on the disk is another thread's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import msgspec

from kalshi_platform import __version__
from kalshi_platform.archive import Archive, open_archive, watermarks
from kalshi_platform.archive.archive_ledger import ArchiveLedger
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.clickhouse.clickhouse_ledger import open_table_ledger
from kalshi_platform.errors import SettingsError, StoreError
from kalshi_platform.exchange.errors import CredentialsError, Unreachable
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.health import monitored_shards
from kalshi_platform.health.health_report import Publisher
from kalshi_platform.journal import reader
from kalshi_platform.journal.journal_identity import JournalIdentity
from kalshi_platform.journal.latency import LatencySummary
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import StartPoint, Writer
from kalshi_platform.loading import cursor, numbering
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.loader import CLICKHOUSE_PACE, PARQUET_PACE, Loader
from kalshi_platform.loading.presence import Presence
from kalshi_platform.loading.rows import DAMAGED, Rows, StaleBook
from kalshi_platform.loading.shared_rows import SharedRows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.loading.state_files import prune_hour_states
from kalshi_platform.processes import Identity
from kalshi_platform.quality import book_audit
from kalshi_platform.recorder.background import TaskHealth, Tasks
from kalshi_platform.recorder.capture import Capture, CaptureState
from kalshi_platform.recorder.trade_backfill import Memory, remembered
from kalshi_platform.recorder.upkeep import BACKFILL, LOOK_UP, SELECTION, Upkeep
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
SWITCH_S = 0.0005
"""How long a thread may keep the interpreter while others want it. The loads want it often and for
moments, capture all the time: at Python's own 5 ms they waited for most of their time."""
HEALTH_S = 1.0
PRUNE_S = 600.0
BLOCKED_S = 10.0
"""A disk that has not taken a record for so long blocks the recording, whether it says so or not."""
HEAD_START_S = 3.0
"""At most so long the loads wait for capture to be connected: they have some of the journal to read again, and
would take the interpreter from it."""


@dataclass(frozen=True)
class StoreHealth:
    """How one store keeps up."""

    lag: int
    """Durable journal records that it does not have yet."""
    committed_ns: int
    loaded_ns: int
    """It has everything that was received up to then."""
    trouble: str | None
    refused: bool
    rows: dict[str, int] = field(default_factory=dict)
    """Written since the start, by dataset."""
    errors: dict[str, int] = field(default_factory=dict)
    """Writes that were not taken since the start, by ClickHouse's error code."""
    oldest_ns: int = 0
    """Receive time of the oldest durable record that it lacks; 0: it lacks none, or that is not known."""


@dataclass(frozen=True)
class Health:
    """What the streamer says of itself. Times are ns since the epoch; 0: not yet."""

    pid: int
    pid_started: float
    shard: int
    shards: int
    """Among how many it shares the markets."""
    state: str
    """starting, connecting, streaming, quiet, blocked, draining, stopping or stopped."""
    started_ns: int
    updated_ns: int
    updated_monotonic_ns: int
    """The same moment by `time.monotonic_ns`, which the machine's processes share and nobody sets."""
    last_frame_ns: int
    last_heard_ns: int
    """Bytes of any kind from the exchange, pings included."""
    last_durable_ns: int
    """The journal's last write."""
    frames: int
    deltas: int
    snapshots: int
    trades: int
    gaps: int
    malformed: int
    connections: int
    markets: int
    synced: int
    """Markets whose book can be believed."""
    journal_records: int
    journal_backlog_bytes: int
    """Received, and not durable yet: what an end of the process would lose."""
    oldest_undurable_ms: int
    """Age of the oldest record that is not durable in the journal; 0 where all are."""
    lag_frames: int
    """The larger of the stores' lags."""
    stores: dict[str, StoreHealth]
    delays_ms: dict[str, LatencySummary]
    """From receive to durable, since the start: in the journal, and in each store."""
    trouble: str | None
    """What is wrong, as a sentence."""
    disconnects: dict[str, int] = field(default_factory=dict)
    """Connections that ended since the start, by cause."""
    tasks: dict[str, TaskHealth] = field(default_factory=dict)
    """The tasks beside capture that have failed since the start; recording goes on without them."""


AUDIT, OBSERVER, MEMORY = "book comparison", "books to compare", "trades of before the start"
REPORT, SAVED_REPORT, PRUNING = "health report", "saved health report", "pruning"
"""The names of tasks beside capture; others are in `upkeep.py`."""
DRAINING, STOPPING, STOPPED, BLOCKED = "draining", "stopping", "stopped", "blocked"


class Streamer:
    """Capture and load of one shard, in background threads."""

    def __init__(self, settings: Settings, shard: int = 0) -> None:
        self._settings = settings
        self._shard = shard
        self._folder = settings.journal_dir(shard)
        self._reports: queue.Queue[HourReport] = queue.Queue()
        self._drains = shard >= settings.stream_shards
        self._writer: Writer | None = None
        self._parquet: ParquetSink | None = None
        self._loads: list[Loader] = []
        self._recent = book_audit.Recent()
        self._tasks = Tasks(self._note)
        self._offset = 0
        """Of the markets whose books are compared next."""
        self._credentials: Credentials | None = None
        self._capture: Capture | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._noting = threading.Lock()
        self._notes: list[tuple[str, Mapping[str, object]]] = []
        """What is to be noted in the journal once there is a capture."""
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self.loss: JournalError | None = None
        """After `stop`: what was received and is not in the journal."""
        self._began_n = 0
        """The first journal record of this start."""
        self._started_ns = time.time_ns()
        self._process_started = Identity.own().started
        self._capturing: threading.Thread | None = None
        self._reporting: list[threading.Thread] = []
        self._ended = threading.Event()
        """Nothing more is written: the health report that follows is the last."""
        self._publisher = Publisher(self._folder)
        self._unpublished = self._unsaved = False

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take the journal's lock and begin.

        Raises `JournalError` where another streamer holds it or the disk refuses, `CredentialsError`
        where the key cannot be used, `SettingsError` for a shard that never was.
        """
        if self._drains:
            self._insist_on_a_journal()
        else:
            self._insist_on_a_key()  # refuse a bad one before anything is opened
        sys.setswitchinterval(SWITCH_S)
        archive = open_archive(
            self._settings
        )  # once: while one asks a store that hangs, no other is made
        writer = self._writer = Writer(
            self._folder,
            claims=cursor.claims(self._folder),
            choose_start=partial(self._choose_start, archive),
        )
        self._began_n = writer.began_n
        self._reporting = [
            _spawn("health", self._run_health),
            _spawn("housekeeping", self._run_housekeeping),
        ]
        self._arrive(writer)
        torn = dataclasses.asdict(writer.unfinished_end) if writer.unfinished_end else None
        start = writer.identity.starts[-1]
        writer.note(
            "started",
            {
                "version": __version__,
                "shard": self._shard,
                "torn": torn,
                "journal": str(writer.id),
                "epoch": start.epoch,
                "start": start.token,
            },
        )
        writer.submit()
        writer.wait_durable(writer.next_n, 5.0)
        if writer.unfinished_end:
            log.warning("The journal's last segment was torn by a kill: %s", writer.unfinished_end)
        if writer.damage:
            log.error("%s", writer.damage)
        self._loads = self._make_loads(writer, archive)
        if self._drains:
            for load in self._loads:
                load.start()
                load.drain()
            return
        self._capturing = _spawn("capture", self._run_capture)
        ends = time.monotonic() + HEAD_START_S
        for load in self._loads:
            load.start(lambda: self._connected or time.monotonic() >= ends)

    @property
    def _connected(self) -> bool:
        return self._capture is not None and self._capture.connected

    def _choose_start(self, archive: Archive, known: JournalIdentity, free: int) -> StartPoint:
        settings, shard = self._settings, self._shard
        stores: dict[str, numbering.Open] = {
            ParquetSink.name: lambda: ArchiveLedger(archive, shard)
        }
        if settings.use_clickhouse:
            stores[ClickHouseSink.name] = lambda: open_table_ledger(settings, shard)
        return numbering.begin(self._folder, stores, known, free)

    def _arrive(self, writer: Writer) -> None:
        try:
            watermarks.arrive(self._settings.journals_dir, self._shard, empty=not writer.next_n)
        except OSError as error:
            writer.close()
            raise JournalError(
                f"{self._folder / watermarks.FILE} cannot be written ({error.strerror}). Make room, and make"
                " the folder writable."
            ) from None

    def _insist_on_a_journal(self) -> None:
        if self._shard not in watermarks.shards(self._settings.journals_dir):
            raise SettingsError(
                f"There is no shard {self._shard}: STREAM_SHARDS is {self._settings.stream_shards}, which"
                f" makes shards 0 to {self._settings.stream_shards - 1}, and {self._folder} has no journal"
                " of an earlier one."
            )

    def _insist_on_a_key(self) -> None:
        exchange = self._settings.exchange
        if exchange.simulated and not exchange.key_file.exists():
            raise CredentialsError(
                "PROD_KEYID is not set, and the exchange simulator is not running either. Set PROD_KEYID"
                " and PROD_KEYFILE, or start it: kalshi-platform simulate."
            )
        load_signer(exchange.key_file)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Stop reading, bring what was received to the stores, release the lock.

        True where everything is in every store; what is not stays in the journal for the next start.
        Reading that does not end in time is left behind, with what it had not handed over. What is lost
        by either the disk or that is in `loss`.
        """
        deadline = time.monotonic() + timeout_s
        self._stopping.set()
        if self._writer is None:
            return True
        if self._capture is not None:
            self._in_loop(self._capture.stop)
        if self._capturing is not None:  # the rest of the time is for what it received
            self._capturing.join(max(min(0.3 * timeout_s, deadline - time.monotonic()), 0.1))
        ended = self._capture is None or self._capture.ended
        if not ended:
            self._lost("Reading did not end in time: the next start marks what that may have cost.")
        closed = self._close_journal(
            max(deadline - time.monotonic() - 2.0, 1.0), submitted=not ended
        )
        for load in self._loads:
            load.drain()
        loaded = [load.join(max(deadline - time.monotonic(), 0.1)) for load in self._loads]
        if closed and self._parquet is not None and loaded[0]:
            self._rest(self._parquet)
        self._report_the_end(max(deadline - time.monotonic(), 1.0))
        return ended and closed and all(loaded)

    def _rest(self, parquet: ParquetSink) -> None:
        """The archive has the whole journal: no hour waits for this shard any more."""
        try:
            parquet.drained(seal=self._drains)
        except (StoreError, OSError) as error:
            log.error("Hours that only waited for shard %d stay open: %s", self._shard, error)

    def _close_journal(self, timeout_s: float, *, submitted: bool) -> bool:
        try:
            if self._writer is not None:
                self._writer.close(timeout_s, submitted=submitted)
        except JournalError as error:
            self._lost(str(error))
            return False
        return True

    def _lost(self, sentence: str) -> None:
        log.error("%s", sentence)
        self.loss = JournalError(f"{self.loss} {sentence}" if self.loss else sentence)

    def _make_loads(self, writer: Writer, archive: Archive) -> list[Loader]:
        parquet = self._parquet = ParquetSink(
            archive, self._shard, self._reports.put, self._settings.journals_dir
        )
        derivation = SharedRows(self._folder, self._shard)
        loads = [
            Loader(
                self._folder,
                writer,
                parquet,
                PARQUET_PACE,
                derivation=derivation,
                distrust=self._distrust,
                observe=self._observe,
                note=self._note,
                presence=Presence(parquet.look, parquet.place),
            )
        ]
        if self._settings.use_clickhouse:
            clickhouse = ClickHouseSink(
                self._settings,
                str(writer.id),
                f"streamer shard {self._shard}",
                shard=self._shard,
            )
            loads.append(
                Loader(
                    self._folder,
                    writer,
                    clickhouse,
                    CLICKHOUSE_PACE,
                    derivation=derivation,
                    distrust=self._distrust_damaged,
                    note=self._note,
                    presence=Presence(clickhouse.look, clickhouse.place),
                )
            )
        return loads

    # -- what the host asks ------------------------------------------------------------------------

    def next_report(self, timeout_s: float) -> HourReport | None:
        """An hour to report: sealed, or the open one when its first file landed. None on time-out."""
        try:
            return (
                self._reports.get(timeout=timeout_s)
                if timeout_s > 0
                else self._reports.get_nowait()
            )
        except queue.Empty:
            return None

    @property
    def drained(self) -> bool:
        """Whether a shard that is only drained has nothing left to do."""
        return self._drains and bool(self._loads) and not any(load.lag for load in self._loads)

    def failure(self) -> BaseException | None:
        """What ended the recording, if something did; of a shard that is only drained, its loads.

        A load that was stopped is no reason to stop recording: it is told as trouble, and begins again.
        """
        writer = self._writer.failure if self._writer is not None else None
        stopped = [load.failure for load in self._loads if load.failure] if self._drains else []
        return self._failure or writer or next(iter(stopped), None)

    def health(self) -> Health:
        """How it is now."""
        capture, writer = self._capture, self._writer
        counters = capture.counters if capture else None
        followed, synced = capture.markets if capture else (0, 0)
        stores = {
            load.name: StoreHealth(
                load.lag,
                load.committed_ns,
                load.loaded_ns,
                load.trouble or load.late,
                load.refused,
                dict(load.rows),
                dict(load.errors),
                load.oldest_ns,
            )
            for load in self._loads
        }
        of_journal = writer.trouble if writer else None
        troubles = [self._blocked(), of_journal, *(s.trouble for s in stores.values())]
        failure = self.failure()
        return Health(
            pid=os.getpid(),
            pid_started=self._process_started,
            shard=self._shard,
            shards=self._settings.stream_shards,
            state=self._state(),
            started_ns=self._started_ns,
            updated_ns=time.time_ns(),
            updated_monotonic_ns=time.monotonic_ns(),
            last_frame_ns=counters.last_frame_ns if counters else 0,
            last_heard_ns=counters.last_heard_ns if counters else 0,
            last_durable_ns=writer.flushed_ns if writer else 0,
            frames=counters.frames if counters else 0,
            deltas=counters.deltas if counters else 0,
            snapshots=counters.snapshots if counters else 0,
            trades=counters.trades if counters else 0,
            gaps=counters.gaps if counters else 0,
            malformed=counters.malformed if counters else 0,
            connections=counters.connections if counters else 0,
            markets=followed,
            synced=synced,
            journal_records=writer.durable.n if writer else 0,
            journal_backlog_bytes=writer.backlog_bytes if writer else 0,
            oldest_undurable_ms=writer.oldest_undurable_ms if writer else 0,
            lag_frames=max((s.lag for s in stores.values()), default=0),
            stores=stores,
            delays_ms={
                name: delays.summary()
                for name, delays in (
                    *([("journal", writer.latency)] if writer else []),
                    *((load.name, load.latency) for load in self._loads),
                )
            },
            trouble=str(failure) if failure else next((t for t in troubles if t), None),
            disconnects=dict(counters.disconnects) if counters else {},
            tasks=self._tasks.states,
        )

    def _state(self) -> str:
        """The first of these that holds: what a supervisor must know comes before what capture does."""
        if self._ended.is_set():
            return STOPPED
        if self._drains:
            return DRAINING
        if self._blocked() is not None:
            return BLOCKED
        if self._stopping.is_set():
            return STOPPING
        return (self._capture.state if self._capture else CaptureState.STARTING).value

    def _blocked(self) -> str | None:
        """Why what was received waits in memory for the disk, as a sentence; None where it does not."""
        writer = self._writer
        if writer is None:
            return None
        if writer.blocked is not None:
            return writer.blocked
        waiting_s = writer.oldest_undurable_ms / 1e3
        if waiting_s <= BLOCKED_S:
            return None
        return (
            f"The disk of {self._folder} has not taken what came {waiting_s:.0f} s ago:"
            f" {writer.backlog_bytes:,} bytes wait in memory. Look at the disk; it goes on by itself."
        )

    # -- threads -----------------------------------------------------------------------------------

    def _run_capture(self) -> None:
        try:
            asyncio.run(self._record())
        except BaseException as error:  # noqa: BLE001 - told to the host, which ends for it
            self._failure = error
            log.error("Recording ended: %s", error)

    async def _record(self) -> None:
        self._loop = asyncio.get_running_loop()
        exchange = self._settings.exchange
        with RestClient(exchange, sleep=self._sleep) as rest:
            upkeep = Upkeep(self._settings, rest, self._shard, self._tasks)
            tickers, memory = await asyncio.gather(
                self._unless_stopped(upkeep.first_list()), asyncio.to_thread(self._remembered)
            )
            if tickers is None or self._stopping.is_set() or self._writer is None:
                return
            capture = Capture(
                exchange.ws_url,
                self._sign,
                self._writer,
                tickers,
                silent_since=memory.last_heard(time.time_ns(), time.monotonic()),
                recent_trades=memory.trades,
                on_lifecycle_events=upkeep.heed,
                on_lost=upkeep.make_up_for,
            )
            with self._noting:
                self._capture = capture
                for kind, detail in self._notes:
                    capture.remark(kind, detail)
            if self._stopping.is_set():
                capture.stop()
            turns: dict[str, Callable[[], Awaitable[None]]] = {
                LOOK_UP: upkeep.look_up,
                SELECTION: lambda: upkeep.select(capture),
                BACKFILL: lambda: upkeep.backfill(capture),
                AUDIT: lambda: self._compare_books(rest, capture),
            }
            beside = [
                asyncio.create_task(self._tasks.keep(name, turn)) for name, turn in turns.items()
            ]
            try:
                await capture.run()
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)

    def _sign(self) -> Credentials:
        """The key for the next connection; the one of before, where its file cannot be read just now."""
        exchange = self._settings.exchange
        try:
            self._credentials = Credentials(exchange.key_id, load_signer(exchange.key_file))
        except CredentialsError as error:
            if self._credentials is None:
                raise
            log.warning("%s The connection is opened with the key of before.", error)
        return self._credentials

    def _in_loop(self, act: Callable[..., object], *arguments: object) -> None:
        """Have capture's thread do something soon; where that has ended, nothing."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(act, *arguments)
        except RuntimeError:  # it is closed, and may be so from one moment to the next
            log.debug("Capture has ended: %s is not called.", act)

    def _observe(self, rows: Rows, state: BookState) -> None:
        """Of a load: what its books are now. It does not stop for who watches it."""
        with self._tasks.surviving(OBSERVER):
            self._recent.saw(rows, state)

    async def _unless_stopped(self, waiting: Awaitable[T]) -> T | None:
        """What is waited for, or None where the streamer is to end before it comes."""
        task = asyncio.ensure_future(waiting)
        while not task.done() and not self._stopping.is_set():
            await asyncio.wait({task}, timeout=0.25)
        if not task.done():
            task.cancel()
            return None
        return task.result()

    def _remembered(self) -> Memory:
        """What the journal knew before this start; where it cannot be read, trades since then are not fetched."""
        try:
            return remembered(self._folder, self._began_n)
        except BaseException as error:  # noqa: BLE001 - as of any task beside capture
            self._tasks.failed(MEMORY, error)
            return Memory(0, ())

    def _sleep(self, seconds: float) -> None:
        """Between two tries of a REST request; the end of the streamer ends it."""
        if self._stopping.wait(seconds):
            raise Unreachable("The streamer ends; the exchange is not asked again.")

    async def _compare_books(self, rest: RestClient, capture: Capture) -> None:
        """Hold some of our books against the exchange's REST books, after a pause."""
        await asyncio.sleep(self._settings.audit_interval_seconds)
        tickers = book_audit.comparable(self._recent.state, self._offset)
        self._offset += len(tickers)
        if not tickers:
            return
        since_ns = book_audit.window_start_ns()
        books = await asyncio.to_thread(rest.orderbooks, tickers)
        if not await self._caught_up(time.time_ns()):
            log.warning("The books were not audited: the load is behind.")
            return
        wire = {t: {"yes": b.yes_dollars or [], "no": b.no_dollars or []} for t, b in books.items()}
        self._judge(
            await asyncio.to_thread(book_audit.compare, self._recent, since_ns, wire), capture
        )

    async def _caught_up(self, until_ns: int) -> bool:
        """Wait until the derived books are as of `until_ns` or later."""
        deadline = time.monotonic() + book_audit.KEEP_S / 2
        while self._recent.state.version < until_ns:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.25)
        return True

    def _judge(self, found: book_audit.Round, capture: Capture) -> None:
        detail = {
            "markets": found.markets,
            "levels": found.levels,
            "mismatches": len(found.mismatches),
        }
        capture.remark("audit", detail)
        if found.yes_price is not None:
            capture.rescale(yes_price=found.yes_price)
            return
        for it in found.mismatches:
            level = {"side": it.side, "price": it.price, "ours": it.ours, "theirs": it.theirs}
            log.warning("The exchange's book differs: %s %s", it.market_ticker, level)
            capture.remark("mismatch", dict(level), it.market_ticker)
        for ticker in {it.market_ticker for it in found.mismatches}:
            capture.mark_book_stale(ticker, "audit_mismatch", {})

    def _distrust_damaged(self, it: StaleBook) -> None:
        """Of a load whose finds another one tells as well, but for what only it has lost: the other may
        have passed those records before the disk damaged them."""
        if it.cause == DAMAGED:
            self._distrust(it)

    def _note(self, kind: str, detail: Mapping[str, object]) -> None:
        """Put a load's or a task's note into the journal: in capture's thread, as soon as there is one."""
        with self._noting:
            if self._drains and self._writer is not None:
                self._writer.note(kind, detail)
                self._writer.submit()
            elif self._capture is None or self._loop is None:
                self._notes.append((kind, detail))
            else:
                self._in_loop(self._capture.remark, kind, detail)

    def _distrust(self, it: StaleBook) -> None:
        if self._capture is not None:
            self._in_loop(self._capture.mark_book_stale, it.market_ticker, it.cause, it.detail)

    def _run_health(self) -> None:
        """Report each second, where no disk is needed, and once more when everything has ended."""
        while True:
            last = self._ended.is_set()
            with self._tasks.surviving(REPORT):
                self._publish()
            if last:
                return
            self._ended.wait(HEALTH_S)

    def _publish(self) -> None:
        try:
            self._publisher.publish(msgspec.json.encode(self.health()))
        except OSError as error:
            if not self._unpublished:
                log.warning(
                    "%s cannot be written (%s): a disk that is full or hangs hides this streamer's health"
                    " from its supervisor.",
                    error.filename,
                    error.strerror,
                )
            self._unpublished = True

    def _run_housekeeping(self) -> None:
        """What waits for the disk: the report beside the journal, and segments past their retention."""
        prune_at = time.monotonic() + PRUNE_S
        while not self._ended.is_set():
            with self._tasks.surviving(SAVED_REPORT):
                self._save_report()
            if time.monotonic() >= prune_at and not self._stopping.is_set():
                prune_at += PRUNE_S
                with self._tasks.surviving(PRUNING):
                    self._prune()
            self._ended.wait(HEALTH_S)
        with self._tasks.surviving(SAVED_REPORT):
            self._save_report()

    def _save_report(self) -> None:
        try:
            self._publisher.save(msgspec.json.encode(self.health()))
            self._unsaved = False
        except OSError as error:
            if not self._unsaved:
                log.error("%s cannot be written: %s", error.filename, error.strerror)
            self._unsaved = True

    def _report_the_end(self, timeout_s: float) -> None:
        """The last report stays beside the journal; in memory only where the disk has not taken it."""
        deadline = time.monotonic() + timeout_s
        self._ended.set()
        for thread in self._reporting:
            thread.join(max(deadline - time.monotonic(), 0.1))
        if not self._unsaved and not any(thread.is_alive() for thread in self._reporting):
            self._publisher.withdraw()

    def _prune(self) -> None:
        """Let go of segments that every store has and nobody will ask for again."""
        needed = min(load.needs_from for load in self._loads)
        older_than_s = self._settings.journal_retention_hours * 3600
        for path in reader.prune(self._folder, needed, older_than_s):
            log.info("Journal segment %s is past its retention: removed.", path.name)
        prune_hour_states(self._folder, reader.oldest_offset(self._folder).n)
        if self._shard == 0:
            self._prune_drained(older_than_s)

    def _prune_drained(self, older_than_s: float) -> None:
        """The same for shards that are no longer configured, and have nobody of their own."""
        settings, journals = self._settings, self._settings.journals_dir
        waiting = monitored_shards.left_over(journals, settings.stream_shards, settings.stores)
        for shard in watermarks.shards(journals):
            if shard >= settings.stream_shards and shard not in waiting:
                folder = settings.journal_dir(shard)
                for path in reader.prune(folder, sys.maxsize, older_than_s):
                    log.info("Journal segment %s of shard %d: removed.", path.name, shard)
                prune_hour_states(folder, reader.oldest_offset(folder).n)


def _spawn(name: str, target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
