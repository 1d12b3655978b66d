"""The streamer: capture and loaders of one shard, in threads of one process.

    capture (asyncio) ──▶ journal writer ──▶ loader into Parquet
                                        └──▶ loader into ClickHouse

A shard that STREAM_SHARDS no longer includes is only *drained*: its loaders bring the rest of its journal to
the stores, without a connection to the exchange.

The `stream` command and Dagster's `stream_orderbook` host it through this class alone. Once a second, until
its end, it publishes a health report (`health.health_report`). The publishing thread touches no disk;
another thread writes the copy on disk. This module only connects the parts and runs their threads: what they
do belongs in `capture`, `upkeep`, `journal.writer` and `loading.loader`.
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
from kalshi_platform.loading.frame_rows import JournalFrames
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
from kalshi_platform.recorder.trade_backfill import History, load_history
from kalshi_platform.recorder.upkeep import BACKFILL, LOOK_UP, SELECTION, TIMETABLE, Upkeep
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
SWITCH_S = 0.0005
"""Interpreter switch interval. The loaders need the interpreter often and briefly, capture continuously: with
Python's default of 5 ms the loaders spent most of their time waiting."""
HEALTH_S = 1.0
PRUNE_S = 600.0
BLOCKED_S = 10.0
"""Recording is blocked where a record is not durable for this long, even if the disk reports no error."""
HEAD_START_S = 3.0
"""How long the loaders wait at most for capture to connect: re-reading the journal would slow it down."""


@dataclass(frozen=True)
class StoreHealth:
    """How far one store has been loaded, as the health report shows it."""

    lag: int
    """Durable journal records that the store does not have yet."""
    committed_ns: int
    loaded_ns: int
    """The store has everything received up to this time."""
    trouble: str | None
    refused: bool
    rows: dict[str, int] = field(default_factory=dict)
    """Rows written since the start, by dataset."""
    errors: dict[str, int] = field(default_factory=dict)
    """Failed writes since the start, by ClickHouse's error code."""
    oldest_ns: int = 0
    """Receive time of the oldest durable record that the store lacks; 0: it lacks none, or unknown."""


@dataclass(frozen=True)
class Health:
    """The streamer's health report. Times are ns since the epoch; 0: not yet."""

    pid: int
    pid_started: float
    shard: int
    shards: int
    """Number of shards that share the markets."""
    state: str
    """starting, connecting, streaming, quiet, blocked, draining, stopping or stopped."""
    started_ns: int
    updated_ns: int
    updated_monotonic_ns: int
    """`updated_ns` by `time.monotonic_ns`, which all processes of the machine share and which is never set."""
    last_frame_ns: int
    last_heard_ns: int
    """When bytes of any kind from the exchange, pings included, were last received."""
    last_durable_ns: int
    """When the journal was last written."""
    frames: int
    deltas: int
    snapshots: int
    trades: int
    gaps: int
    malformed: int
    connections: int
    markets: int
    synced: int
    """Markets whose book is synced."""
    journal_records: int
    journal_backlog_bytes: int
    """Bytes received and not durable yet: the loss if the process were killed."""
    oldest_undurable_ms: int
    """Age of the oldest record that is not durable in the journal; 0 where all are durable."""
    lag_frames: int
    """The larger of the stores' lags."""
    stores: dict[str, StoreHealth]
    delays_ms: dict[str, LatencySummary]
    """Latency from receive to durable since the start, in the journal and in each store."""
    trouble: str | None
    """The most severe problem, as a sentence; None while there is none."""
    disconnects: dict[str, int] = field(default_factory=dict)
    """Connections that ended since the start, by cause."""
    drift: dict[str, int] = field(default_factory=dict)
    """Drift of the wire since the start, as "what|type|path": in how many loaded frames it was."""
    tasks: dict[str, TaskHealth] = field(default_factory=dict)
    """Background tasks that have failed since the start; recording goes on without them."""


AUDIT, OBSERVER, MEMORY = "book comparison", "books to compare", "trades of before the start"
REPORT, SAVED_REPORT, PRUNING = "health report", "saved health report", "pruning"
"""Names of background tasks; more are in `upkeep`."""
MOST_DRIFT = 256
OTHER_DRIFT = "others|others|others"
"""The drift of the wire beyond so many different findings, in the health report."""
DRAINING, STOPPING, STOPPED, BLOCKED = "draining", "stopping", "stopped", "blocked"


class Streamer:
    """Runs capture and loaders of one shard in background threads."""

    def __init__(self, settings: Settings, shard: int = 0) -> None:
        self._settings = settings
        self._shard = shard
        self._folder = settings.journal_dir(shard)
        self._reports: queue.Queue[HourReport] = queue.Queue()
        self._drains = shard >= settings.stream_shards
        self._writer: Writer | None = None
        self._parquet: ParquetSink | None = None
        self._loaders: list[Loader] = []
        self._recent = book_audit.Recent()
        self._tasks = Tasks(self._note)
        self._drift: dict[str, int] = {}
        self._offset = 0
        """Index of the market whose book is compared next."""
        self._credentials: Credentials | None = None
        self._capture: Capture | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notes_lock = threading.Lock()
        self._notes: list[tuple[str, Mapping[str, object]]] = []
        """Notes to journal once capture exists."""
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self.loss: JournalError | None = None
        """After `stop`: which received frames are not in the journal; None where all are."""
        self._began_n = 0
        """The first journal record of this start."""
        self._started_ns = time.time_ns()
        self._process_started = Identity.own().started
        self._capturing: threading.Thread | None = None
        self._reporting: list[threading.Thread] = []
        self._ended = threading.Event()
        """Set once nothing more is written: the next health report is the last."""
        self._publisher = Publisher(self._folder)
        self._unpublished = self._unsaved = False

    # -- start and stop --------------------------------------------------------------------------

    def start(self) -> None:
        """Lock the journal and start all threads.

        Raises: `JournalError` where another streamer holds the lock or the disk refuses,
        `CredentialsError` where the key cannot be used, `SettingsError` for a shard that never existed.
        """
        if self._drains:
            self._require_journal()
        else:
            self._require_key()  # refuse a bad key before anything is opened
        sys.setswitchinterval(SWITCH_S)
        # One archive for all users: opening a second one would wait again for a store that hangs.
        archive = open_archive(self._settings)
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
        self._register_watermark(writer)
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
            log.warning(
                "A kill left an unfinished end in the journal's last segment: %s",
                writer.unfinished_end,
            )
        if writer.damage:
            log.error("%s", writer.damage)
        self._loaders = self._make_loaders(writer, archive)
        if self._drains:
            for loader in self._loaders:
                loader.start()
                loader.drain()
            return
        self._capturing = _spawn("capture", self._run_capture)
        ends = time.monotonic() + HEAD_START_S
        for loader in self._loaders:
            loader.start(lambda: self._connected or time.monotonic() >= ends)

    @property
    def _connected(self) -> bool:
        return self._capture is not None and self._capture.connected

    def _choose_start(self, archive: Archive, known: JournalIdentity, free: int) -> StartPoint:
        settings, shard = self._settings, self._shard
        stores: dict[str, numbering.OpenLedger] = {
            ParquetSink.name: lambda: ArchiveLedger(archive, shard)
        }
        if settings.use_clickhouse:
            stores[ClickHouseSink.name] = lambda: open_table_ledger(settings, shard)
        return numbering.choose_start(self._folder, stores, known, free)

    def _register_watermark(self, writer: Writer) -> None:
        try:
            watermarks.register(self._settings.journals_dir, self._shard, empty=not writer.next_n)
        except OSError as error:
            writer.close()
            raise JournalError(
                f"{self._folder / watermarks.FILE} cannot be written ({error.strerror}). Make room, and make"
                " the folder writable."
            ) from None

    def _require_journal(self) -> None:
        if self._shard not in watermarks.shards(self._settings.journals_dir):
            raise SettingsError(
                f"There is no shard {self._shard}: STREAM_SHARDS is {self._settings.stream_shards}, which"
                f" makes shards 0 to {self._settings.stream_shards - 1}, and {self._folder} has no journal"
                " of an earlier one."
            )

    def _require_key(self) -> None:
        exchange = self._settings.exchange
        if exchange.simulated and not exchange.key_file.exists():
            raise CredentialsError(
                "PROD_KEYID is not set, and the exchange simulator is not running either. Set PROD_KEYID"
                " and PROD_KEYFILE, or start it: kalshi-platform simulate."
            )
        load_signer(exchange.key_file)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Stop reading, load what was received into the stores, release the lock.

        Returns True where everything is in every store; the rest stays in the journal for the next start.
        A capture thread that does not end in time is abandoned with the frames it had not submitted. What
        is lost by that or by the disk is in `loss`.
        """
        deadline = time.monotonic() + timeout_s
        self._stopping.set()
        if self._writer is None:
            return True
        if self._capture is not None:
            self._call_in_loop(self._capture.stop)
        if self._capturing is not None:  # the remaining time is for loading what it received
            self._capturing.join(max(min(0.3 * timeout_s, deadline - time.monotonic()), 0.1))
        ended = self._capture is None or self._capture.ended
        if not ended:
            self._record_loss(
                "Reading did not end in time: the next start marks a gap for what it may cost."
            )
        closed = self._close_journal(
            max(deadline - time.monotonic() - 2.0, 1.0), submitted=not ended
        )
        for loader in self._loaders:
            loader.drain()
        loaded = [loader.join(max(deadline - time.monotonic(), 0.1)) for loader in self._loaders]
        if closed and self._parquet is not None and loaded[0]:
            self._finish_archive(self._parquet)
        self._publish_final_report(max(deadline - time.monotonic(), 1.0))
        return ended and closed and all(loaded)

    def _finish_archive(self, parquet: ParquetSink) -> None:
        """Release the hours that wait for this shard: the archive has its whole journal."""
        try:
            parquet.drained(seal=self._drains)
        except (StoreError, OSError) as error:
            log.error("Hours that wait for shard %d only stay unsealed: %s", self._shard, error)

    def _close_journal(self, timeout_s: float, *, submitted: bool) -> bool:
        try:
            if self._writer is not None:
                self._writer.close(timeout_s, submitted=submitted)
        except JournalError as error:
            self._record_loss(str(error))
            return False
        return True

    def _record_loss(self, sentence: str) -> None:
        log.error("%s", sentence)
        self.loss = JournalError(f"{self.loss} {sentence}" if self.loss else sentence)

    def _make_loaders(self, writer: Writer, archive: Archive) -> list[Loader]:
        parquet = self._parquet = ParquetSink(
            archive,
            self._shard,
            self._reports.put,
            self._settings.journals_dir,
            JournalFrames(self._folder, self._shard) if self._settings.keep_frames else None,
        )
        shared_rows = SharedRows(self._folder, self._shard)
        loaders = [
            Loader(
                self._folder,
                writer,
                parquet,
                PARQUET_PACE,
                shared_rows=shared_rows,
                on_stale_book=self._mark_book_stale,
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
            loaders.append(
                Loader(
                    self._folder,
                    writer,
                    clickhouse,
                    CLICKHOUSE_PACE,
                    shared_rows=shared_rows,
                    on_stale_book=self._mark_damaged_stale,
                    note=self._note,
                    presence=Presence(clickhouse.look, clickhouse.place),
                )
            )
        return loaders

    # -- called by the host ------------------------------------------------------------------------

    def next_report(self, timeout_s: float) -> HourReport | None:
        """The next hour to report: sealed, or open with its first file written. None on time-out."""
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
        """Whether a shard that is only drained is fully loaded."""
        return (
            self._drains and bool(self._loaders) and not any(loader.lag for loader in self._loaders)
        )

    def failure(self) -> BaseException | None:
        """The error that ended the recording, or the loaders of a shard that is only drained; None if none.

        A stopped loader does not end the recording: it is reported as a problem and restarted.
        """
        writer = self._writer.failure if self._writer is not None else None
        stopped = (
            [loader.failure for loader in self._loaders if loader.failure] if self._drains else []
        )
        return self._failure or writer or next(iter(stopped), None)

    def health(self) -> Health:
        """The current health report."""
        capture, writer = self._capture, self._writer
        counters = capture.counters if capture else None
        followed, synced = capture.markets if capture else (0, 0)
        stores = {
            loader.name: StoreHealth(
                loader.lag,
                loader.committed_ns,
                loader.loaded_ns,
                loader.trouble or loader.late,
                loader.refused,
                dict(loader.rows),
                dict(loader.errors),
                loader.oldest_ns,
            )
            for loader in self._loaders
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
                name: latency.summary()
                for name, latency in (
                    *([("journal", writer.latency)] if writer else []),
                    *((loader.name, loader.latency) for loader in self._loaders),
                )
            },
            trouble=str(failure) if failure else next((t for t in troubles if t), None),
            disconnects=dict(counters.disconnects) if counters else {},
            drift=dict(self._drift),
            tasks=self._tasks.states,
        )

    def _state(self) -> str:
        """The state for the health report: states the supervisor acts on precede those of capture."""
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
        """Why received frames wait in memory for the disk, as a sentence; None where they do not."""
        writer = self._writer
        if writer is None:
            return None
        if writer.blocked is not None:
            return writer.blocked
        waiting_s = writer.oldest_undurable_ms / 1e3
        if waiting_s <= BLOCKED_S:
            return None
        return (
            f"The disk of {self._folder} has not accepted frames received {waiting_s:.0f} s ago:"
            f" {writer.backlog_bytes:,} bytes wait in memory. Check the disk; writing resumes by itself."
        )

    # -- threads -----------------------------------------------------------------------------------

    def _run_capture(self) -> None:
        try:
            asyncio.run(self._record())
        except BaseException as error:  # noqa: BLE001 - `failure` reports it to the host, which ends
            self._failure = error
            log.error("Recording ended: %s", error)

    async def _record(self) -> None:
        self._loop = asyncio.get_running_loop()
        exchange = self._settings.exchange
        with RestClient(exchange, sleep=self._sleep) as rest:
            upkeep = Upkeep(self._settings, rest, self._shard, self._tasks)
            tickers, history = await asyncio.gather(
                self._unless_stopped(upkeep.first_selection()),
                asyncio.to_thread(self._load_history),
            )
            if tickers is None or self._stopping.is_set() or self._writer is None:
                return
            capture = Capture(
                exchange.ws_url,
                self._sign,
                self._writer,
                tickers,
                silent_since=history.last_received(time.time_ns(), time.monotonic()),
                recent_trades=history.trades,
                on_lifecycle_events=upkeep.apply_events,
                on_missed=upkeep.handle_missed,
            )
            with self._notes_lock:
                self._capture = capture
                for kind, detail in self._notes:
                    capture.note(kind, detail)
            if self._stopping.is_set():
                capture.stop()
            turns: dict[str, Callable[[], Awaitable[None]]] = {
                LOOK_UP: upkeep.look_up,
                SELECTION: lambda: upkeep.select(capture),
                BACKFILL: lambda: upkeep.backfill(capture),
                TIMETABLE: lambda: upkeep.note_schedule(capture),
                AUDIT: lambda: self._compare_books(rest, capture),
            }
            background_tasks = [
                asyncio.create_task(self._tasks.run_forever(name, turn))
                for name, turn in turns.items()
            ]
            try:
                await capture.run()
            finally:
                for task in background_tasks:
                    task.cancel()
                await asyncio.gather(*background_tasks, return_exceptions=True)

    def _sign(self) -> Credentials:
        """Load the key for the next connection; use the previous one where its file cannot be read now."""
        exchange = self._settings.exchange
        try:
            self._credentials = Credentials(exchange.key_id, load_signer(exchange.key_file))
        except CredentialsError as error:
            if self._credentials is None:
                raise
            log.warning("%s The connection is opened with the previous key.", error)
        return self._credentials

    def _call_in_loop(self, act: Callable[..., object], *arguments: object) -> None:
        """Schedule a call in capture's thread; do nothing where that has ended."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(act, *arguments)
        except RuntimeError:  # the loop is closed, which may happen at any moment
            log.debug("Capture has ended: %s is not called.", act)

    def _observe(self, rows: Rows, state: BookState) -> None:
        """Take a loader's books for the live-book check, and the drift of the wire; a failure here must not stop the loader."""
        with self._tasks.guarded(OBSERVER):
            self._recent.saw(rows, state)
            for finding, frames in rows.drift.items():
                known = finding in self._drift or len(self._drift) < MOST_DRIFT
                key = finding if known else OTHER_DRIFT
                self._drift[key] = self._drift.get(key, 0) + frames

    async def _unless_stopped(self, waiting: Awaitable[T]) -> T | None:
        """Await a result; return None where the streamer is stopped before."""
        task = asyncio.ensure_future(waiting)
        while not task.done() and not self._stopping.is_set():
            await asyncio.wait({task}, timeout=0.25)
        if not task.done():
            task.cancel()
            return None
        return task.result()

    def _load_history(self) -> History:
        """Load the end of the preceding recording; where it cannot be read, no trades since are backfilled."""
        try:
            return load_history(self._folder, self._began_n)
        except BaseException as error:  # noqa: BLE001 - no background task may stop recording
            self._tasks.failed(MEMORY, error)
            return History(0, ())

    def _sleep(self, seconds: float) -> None:
        """Sleep between attempts of a REST request; raise once the streamer is stopped."""
        if self._stopping.wait(seconds):
            raise Unreachable("The streamer is stopping; the request is not retried.")

    async def _compare_books(self, rest: RestClient, capture: Capture) -> None:
        """After a pause, compare some books with the exchange's REST books."""
        await asyncio.sleep(self._settings.audit_interval_seconds)
        tickers = book_audit.comparable(self._recent.state, self._offset)
        self._offset += len(tickers)
        if not tickers:
            return
        since_ns = book_audit.window_start_ns()
        books = await asyncio.to_thread(rest.orderbooks, tickers)
        if not await self._caught_up(time.time_ns()):
            log.warning("The books were not compared: the loader is behind.")
            return
        wire = {t: {"yes": b.yes_dollars or [], "no": b.no_dollars or []} for t, b in books.items()}
        self._report_comparison(
            await asyncio.to_thread(book_audit.compare, self._recent, since_ns, wire), capture
        )

    async def _caught_up(self, until_ns: int) -> bool:
        """Wait until the loader's books are as of `until_ns` or later; return False on time-out."""
        deadline = time.monotonic() + book_audit.KEEP_S / 2
        while self._recent.state.version < until_ns:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.25)
        return True

    def _report_comparison(self, result: book_audit.Round, capture: Capture) -> None:
        detail = {
            "markets": result.markets,
            "levels": result.levels,
            "mismatches": len(result.mismatches),
        }
        capture.note("audit", detail)
        if result.yes_price is not None:
            capture.rescale(yes_price=result.yes_price)
            return
        for wrong in result.mismatches:
            level = {
                "side": wrong.side,
                "price": wrong.price,
                "ours": wrong.ours,
                "theirs": wrong.theirs,
            }
            log.warning("The exchange's book differs: %s %s", wrong.market_ticker, level)
            capture.note("mismatch", dict(level), wrong.market_ticker)
        for ticker in {wrong.market_ticker for wrong in result.mismatches}:
            capture.mark_book_stale(ticker, "audit_mismatch", {})

    def _mark_damaged_stale(self, stale: StaleBook) -> None:
        """Handle the second loader's stale books: only those with lost records.

        The first loader reports all others, but it may have read the records before the disk damaged them.
        """
        if stale.cause == DAMAGED:
            self._mark_book_stale(stale)

    def _note(self, kind: str, detail: Mapping[str, object]) -> None:
        """Journal a loader's or a task's note in capture's thread, as soon as capture exists."""
        with self._notes_lock:
            if self._drains and self._writer is not None:
                self._writer.note(kind, detail)
                self._writer.submit()
            elif self._capture is None or self._loop is None:
                self._notes.append((kind, detail))
            else:
                self._call_in_loop(self._capture.note, kind, detail)

    def _mark_book_stale(self, stale: StaleBook) -> None:
        if self._capture is not None:
            self._call_in_loop(
                self._capture.mark_book_stale, stale.market_ticker, stale.cause, stale.detail
            )

    def _run_health(self) -> None:
        """Publish the health report every second without touching a disk, and once more at the end."""
        while True:
            last = self._ended.is_set()
            with self._tasks.guarded(REPORT):
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
        """Do the work that may wait for a disk: save the health report, prune segments past retention."""
        prune_at = time.monotonic() + PRUNE_S
        while not self._ended.is_set():
            with self._tasks.guarded(SAVED_REPORT):
                self._save_report()
            if time.monotonic() >= prune_at and not self._stopping.is_set():
                prune_at += PRUNE_S
                with self._tasks.guarded(PRUNING):
                    self._prune()
            self._ended.wait(HEALTH_S)
        with self._tasks.guarded(SAVED_REPORT):
            self._save_report()

    def _save_report(self) -> None:
        try:
            self._publisher.save(msgspec.json.encode(self.health()))
            self._unsaved = False
        except OSError as error:
            if not self._unsaved:
                log.error("%s cannot be written: %s", error.filename, error.strerror)
            self._unsaved = True

    def _publish_final_report(self, timeout_s: float) -> None:
        """Publish the last report; it stays in memory only where the disk did not accept the saved copy."""
        deadline = time.monotonic() + timeout_s
        self._ended.set()
        for thread in self._reporting:
            thread.join(max(deadline - time.monotonic(), 0.1))
        if not self._unsaved and not any(thread.is_alive() for thread in self._reporting):
            self._publisher.withdraw()

    def _prune(self) -> None:
        """Remove segments past retention that every store has and no loader needs."""
        needed = min(loader.needs_from for loader in self._loaders)
        older_than_s = self._settings.journal_retention_hours * 3600
        for path in reader.prune(self._folder, needed, older_than_s):
            log.info("Journal segment %s is past its retention: removed.", path.name)
        prune_hour_states(self._folder, reader.oldest_offset(self._folder).n)
        if self._shard == 0:
            self._prune_drained(older_than_s)

    def _prune_drained(self, older_than_s: float) -> None:
        """Prune the journals of drained shards that are no longer configured and have no streamer."""
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
