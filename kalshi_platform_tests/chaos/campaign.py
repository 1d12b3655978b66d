"""The campaign: kill anything at any moment, then prove what was promised.

`make chaos` runs it with 200 kills and writes `docs/reliability.md`; the test suite runs a short
one. The exchange is a simulator in this process, which no kill reaches, so that its books are the
truth at the end. Everything else is one `kalshi-platform up` on ports and a folder of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import psutil

from kalshi_platform import __version__
from kalshi_platform import settings as platform_settings
from kalshi_platform.exchange.frames import Kind
from kalshi_platform.exchange.numbers import contracts, dollars
from kalshi_platform.recording import journal
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running
from kalshi_platform.storage import clickhouse
from kalshi_platform.storage.errors import StoreError
from kalshi_platform.streamer import read_health

ROOT = Path(__file__).resolve().parents[2]
PROOF = ROOT / "infra" / "queries" / "lossless_proof.sql"
REPORT = ROOT / "docs" / "reliability.md"
MARKETS = 24
PATIENCE_S = 150.0


@dataclass(frozen=True)
class Kill:
    """One kill. Times are seconds since the epoch."""

    target: str
    at: float
    recovered_s: float | None
    """Seconds until frames came and ClickHouse had them; None: the next kill came first."""
    of_streamer: bool = False
    """Whether a living streamer was among what was killed."""


@dataclass
class Outcome:
    """What the campaign found."""

    kills: list[Kill]
    minutes: float
    frames: int
    events_hot: int
    events_cold: int
    lost: int
    """Journalled deltas that a store does not have."""
    doubled: int
    unexplained: int
    """Numbers missing without a gap row."""
    books_differ: int
    connections: int
    ends: int
    """`disconnected` rows."""
    unmarked_kills: int
    """Kills of the streamer without a `disconnected` row that gives cause and span."""
    gaps: int
    journal_delay_s: list[float] = field(default_factory=list)
    """For each kill of the streamer: age of the last journalled frame at that moment."""

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        broken = (
            self.lost
            or self.doubled
            or self.unexplained
            or self.books_differ
            or self.unmarked_kills
        )
        return not broken and self.connections == self.ends


class Platform:
    """One `kalshi-platform up`, and the processes of it that can be killed."""

    def __init__(self, folder: Path, simulator: Simulator) -> None:
        self.data = folder / "data"
        ui, store = _free_ports(2)
        self._ui = ui
        self._log = folder / "up.log"
        self.settings = platform_settings.load(
            kalshi_data_dir=self.data,
            embedded_clickhouse_port=store,
            clickhouse_url=f"http://127.0.0.1:{store}",
            kalshi_ws_url=simulator.ws_url,
            kalshi_rest_url=simulator.rest_url,
        )
        self._environment = {
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith(("PROD_", "KALSHI_", "CLICKHOUSE_"))
            },
            "KALSHI_DATA_DIR": str(self.data),
            "EMBEDDED_CLICKHOUSE_PORT": str(store),
            "KALSHI_WS_URL": simulator.ws_url,
            "KALSHI_REST_URL": simulator.rest_url,
            "NO_COLOR": "1",
        }
        key = self.settings.exchange.key_file
        key.parent.mkdir(parents=True)
        shutil.copy(simulator.key_file, key)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start `up`."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kalshi_platform", "up", "--port", str(self._ui)],
                cwd=self.data.parent,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)

    def family(self) -> list[psutil.Process]:
        """Every living process of this data folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("KALSHI_DATA_DIR") == str(
                    self.data
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def victims(self, target: str) -> list[psutil.Process]:
        """The processes that a kill of `target` ends."""
        if target == "everything":
            return self.family()
        wanted: dict[str, Callable[[psutil.Process], bool]] = {
            "streamer": lambda p: p.pid == self.streamer_pid(),
            "code server": lambda p: "api" in p.cmdline() and "grpc" in p.cmdline(),
            "streamer and code server": lambda p: (
                p.pid == self.streamer_pid() or ("api" in p.cmdline() and "grpc" in p.cmdline())
            ),
            "ClickHouse": lambda p: p.cmdline()[-1:] == ["clickhouse"],
            "daemon": lambda p: "dagster._daemon" in p.cmdline(),
        }
        return [p for p in self.family() if _holds(wanted[target], p)]

    def health(self) -> dict[str, Any]:
        """The streamer's own report; empty before the first."""
        return read_health(self.settings.journal_dir()) or {}

    def streamer_pid(self) -> int:
        """The process that records, by its own report."""
        return int(self.health().get("pid", 0))

    def recovered(self, since: float) -> bool:
        """Whether every book is whole, frames come and both stores take them."""
        health = self.health()
        return bool(health) and (
            health["updated_ns"] / 1e9 > since
            and health["last_frame_ns"] / 1e9 > since
            and health["synced"] == MARKETS
            and psutil.pid_exists(health["pid"])
            and all(s["trouble"] is None for s in health["stores"].values())
            and health["stores"]["clickhouse"]["committed_ns"] / 1e9 > since
            and health["stores"]["clickhouse"]["lag"] < 20_000
        )


TARGETS = {
    "streamer": 5,
    "ClickHouse": 4,
    "streamer and code server": 3,
    "code server": 2,
    "daemon": 1,
    "everything": 3,
}
"""What is killed, and how often beside the others."""


def run(kills: int, seed: int, rate: float, say: Callable[[str], None]) -> Outcome:
    """Run one campaign."""
    dice = random.Random(seed)
    began = time.monotonic()
    with (
        _folder() as folder,
        running(
            SimulatorConfig(
                markets=MARKETS,
                rolling_markets=0,
                rate=rate,
                seed=seed,
                key_file=folder / "key.pem",
            )
        ) as simulator,
    ):
        it = Platform(folder, simulator)
        it.start()
        try:
            _wait(lambda: it.recovered(0.0), "the first recording", it)
            done = []
            for number in range(1, kills + 1):
                # At any moment: also while the platform is still recovering from the last one.
                time.sleep(dice.uniform(0.0, 5.0))
                done.append(_kill(it, dice, wait=number == kills or dice.random() < 0.25))
                how = done[-1].recovered_s
                say(
                    f"{number}/{kills} {done[-1].target}: "
                    + ("the next kill comes first" if how is None else f"recovered in {how:.1f} s")
                )
            simulator.pause()
            time.sleep(2.0)
            _wait(lambda: it.recovered(0.0) and _idle(it), "the last frame to be stored", it)
            it.stop()
            return _judge(it, simulator, done, (time.monotonic() - began) / 60)
        finally:
            for process in it.family():
                process.kill()


def _kill(it: Platform, dice: random.Random, *, wait: bool) -> Kill:
    names = list(TARGETS)
    victims: list[psutil.Process] = []
    while not victims:  # what is down already cannot be killed: choose another
        target = dice.choices(names, [TARGETS[n] for n in names])[0]
        victims = it.victims(target)
    of_streamer = it.streamer_pid() in {victim.pid for victim in victims}
    at = time.time()
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    if target == "everything" and it.process is not None:
        it.process.wait()
        it.start()
    if not wait:
        return Kill(target, at, None, of_streamer)
    _wait(lambda: it.recovered(at), f"recovery from the end of {target}", it)
    return Kill(target, at, time.time() - at, of_streamer)


def _idle(it: Platform) -> bool:
    before = it.health()
    time.sleep(2.0)
    after = it.health()
    return bool(before["frames"] == after["frames"] and after["stores"]["clickhouse"]["lag"] < 50)


def _judge(it: Platform, simulator: Simulator, kills: list[Kill], minutes: float) -> Outcome:
    """Hold what is stored against the journal, and the books against the exchange's."""
    from kalshi_platform.storage.embedded import running as clickhouse_running

    settings = it.settings
    records = _records(settings)
    deltas = sum(kind == Kind.DELTA for _, kind in records)
    cold = _archived(settings, "orderbook_events")
    with clickhouse_running(settings.data_dir / "clickhouse") as url:
        hot_settings = settings.model_copy(update={"clickhouse_url": str(url)})
        client = clickhouse.connect(hot_settings)

        def query(sql: str) -> list[Any]:
            return list(client.query(sql).result_rows)

        hot_deltas = query("SELECT count() FROM orderbook_events WHERE type = 'delta'")[0][0]
        hot = query("SELECT count() FROM orderbook_events")[0][0]
        proof = client.query(PROOF.read_text().strip().rstrip(";"))
        rows = [dict(zip(proof.column_names, r, strict=True)) for r in proof.result_rows]
        kinds = dict(query("SELECT kind, count() FROM stream_events GROUP BY kind"))
        marked = query(
            "SELECT count() FROM stream_events WHERE kind = 'disconnected' AND detail LIKE '%\"span_s\"%'"
        )[0][0]
        levels = {
            (t, s, f"{p:.4f}", f"{q:.2f}")
            for t, s, p, q in query(
                "SELECT market_ticker, side, price, size FROM latest_levels FINAL WHERE size > 0"
            )
        }
    truth = {
        (ticker, side, dollars(price), contracts(size))
        for ticker, book in simulator.books().items()
        for side, ladder in (("yes", book.yes), ("no", book.no))
        for price, size in ladder.items()
    }
    cold_deltas = cold.filter(pl.col("type") == "delta").height
    streamer_kills = [
        k for k in kills if k.target in {"streamer", "streamer and code server", "everything"}
    ]
    return Outcome(
        kills=kills,
        minutes=minutes,
        frames=sum(kind != Kind.NOTE for _, kind in records),
        events_hot=hot,
        events_cold=cold.height,
        lost=abs(deltas - hot_deltas) + abs(deltas - cold_deltas),
        doubled=sum(r["doubled"] for r in rows)
        + int(cold.is_duplicated().sum())
        + abs(hot - cold.height),
        unexplained=sum(r["unexplained_holes"] for r in rows),
        books_differ=len(levels ^ truth),
        connections=kinds.get("connected", 0),
        ends=kinds.get("disconnected", 0),
        unmarked_kills=max(_connections_cut(settings, streamer_kills) - marked, 0),
        gaps=kinds.get("gap", 0),
        journal_delay_s=_delays(settings, kills),
    )


def _connections_cut(settings: Settings, kills: list[Kill]) -> int:
    """How many connections were open at a kill: between their `connected` and the next start."""
    folder = settings.journal_dir()
    open_since: dict[bytes, int] = {}
    cut = 0
    for block in journal.read(folder, journal.beginning(folder)):
        notes = block.batch.to_pylist()
        for record in (r for r in notes if r["kind"] == Kind.NOTE):
            if b'"kind":"connected"' in record["frame"]:
                open_since[record["conn"]] = record["recv_ns"]
            elif b'"kind":"disconnected"' in record["frame"]:
                open_since.pop(record["conn"], None)
            elif b'"kind":"started"' in record["frame"]:
                cut += len(open_since)
                open_since.clear()
    return min(cut, len(kills)) if kills else cut


def _delays(settings: Settings, kills: list[Kill]) -> list[float]:
    """Age of the newest journalled frame at each kill of a streamer whose connection was open."""
    folder = settings.journal_dir()
    spans: list[list[float]] = []  # of connections: the first frame, the last one, the end
    for block in journal.read(folder, journal.beginning(folder)):
        for record in block.batch.to_pylist():
            at = record["recv_ns"] / 1e9
            if record["kind"] != Kind.NOTE:
                spans[-1][0], spans[-1][1] = min(spans[-1][0], at), at
            elif b'"kind":"connected"' in record["frame"]:
                spans.append([float("inf"), 0.0, float("inf")])
            elif spans and (
                b'"kind":"disconnected"' in record["frame"]
                or b'"kind":"started"' in record["frame"]
            ):
                spans[-1][2] = min(spans[-1][2], at)
    delays = []
    for kill in kills:
        recording = [s for s in spans if s[0] <= kill.at < s[2]]
        if kill.of_streamer and recording:
            delays.append(kill.at - recording[-1][1])
    return [max(delay, 0.0) for delay in delays]


def _records(settings: Settings) -> list[tuple[int, int]]:
    """(receive time, kind) of the whole journal."""
    folder = settings.journal_dir()
    return [
        pair
        for block in journal.read(folder, journal.beginning(folder))
        for pair in zip(
            block.batch.column("recv_ns").to_pylist(),
            block.batch.column("kind").to_pylist(),
            strict=True,
        )
    ]


def _archived(settings: Settings, dataset: str) -> pl.DataFrame:
    return pl.read_parquet(
        f"{settings.archive_dir}/{dataset}/**/*.parquet", hive_partitioning=False
    )


def _wait(condition: Callable[[], bool], what: str, it: Platform) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        if it.process is not None and it.process.poll() is not None:
            it.start()  # as a person does: after a kill a port may stay taken for a moment
        try:
            if condition():
                return
        except (StoreError, KeyError):
            time.sleep(0.5)  # it is just coming up
        if time.monotonic() > deadline:
            raise AssertionError(
                f"waited {PATIENCE_S:.0f} s for {what}; last health: {it.health()}"
            )
        time.sleep(0.2)


def _holds(condition: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    try:
        return condition(process)
    except psutil.Error:
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        yield Path(name)


# -- the report --------------------------------------------------------------------------------


def report(outcome: Outcome, rate: float, seed: int) -> str:
    """The campaign as a page of the docs."""
    by_target: Counter[str] = Counter(k.target for k in outcome.kills)
    lines = [
        "# Reliability",
        "",
        "What holds when anything is killed at any moment. This page is written by `make chaos`; the"
        " same campaign, shorter, is part of `make test`.",
        "",
        f"{len(outcome.kills)} kills (`kill -9`) in {outcome.minutes:.0f} minutes, {MARKETS} markets,"
        f" {rate:,.0f} deltas a second, seed {seed}; version {__version__}, Python"
        f" {platform.python_version()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "| | |",
        "|---|---:|",
        f"| frames in the journal | {outcome.frames:,} |",
        f"| rows in ClickHouse, `orderbook_events` | {outcome.events_hot:,} |",
        f"| rows in Parquet, `orderbook_events` | {outcome.events_cold:,} |",
        f"| journalled frames lost | {outcome.lost} |",
        f"| rows doubled | {outcome.doubled} |",
        f"| numbers missing without a `gap` row | {outcome.unexplained} |",
        f"| levels that differ from the exchange's books at the end | {outcome.books_differ} |",
        f"| connections begun / ended by a row | {outcome.connections} / {outcome.ends} |",
        f"| interruptions without cause and span | {outcome.unmarked_kills} |",
        f"| gaps on an open connection | {outcome.gaps} |",
        "",
        "| killed | times | recovery, median | longest |",
        "|---|---:|---:|---:|",
    ]
    for target, times in sorted(by_target.items(), key=lambda item: -item[1]):
        waited = [
            k.recovered_s for k in outcome.kills if k.target == target and k.recovered_s is not None
        ]
        median = f"{statistics.median(waited):.1f} s" if waited else "-"
        longest = f"{max(waited):.1f} s" if waited else "-"
        lines.append(f"| {target} | {times} | {median} | {longest} |")
    lines += [
        "",
        "Recovered means: frames come, every book is whole, both stores take rows. It is measured where"
        " the campaign waited for it; the other kills fell into a recovery that was still going on.",
    ]
    if outcome.journal_delay_s:
        delays = sorted(outcome.journal_delay_s)
        lines += [
            "",
            "What a kill of the streamer can cost is what had not reached the journal. Age of the newest"
            f" journalled frame at the moment of the kill: median {1000 * statistics.median(delays):.0f} ms,"
            f" longest {1000 * delays[-1]:.0f} ms (frames come every 20 ms here).",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """`make chaos`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1_000.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=REPORT)
    given = parser.parse_args()
    outcome = run(given.kills, given.seed, given.rate, lambda line: print(line, flush=True))  # noqa: T201
    text = report(outcome, given.rate, given.seed)
    given.report.write_text(text)
    print(text)  # noqa: T201
    sys.exit(0 if outcome.sound else 1)


if __name__ == "__main__":
    main()
