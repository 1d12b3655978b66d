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
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from kalshi_platform import __version__
from kalshi_platform.exchange.frames import Kind
from kalshi_platform.recording import journal
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running
from kalshi_platform_tests.chaos.proof import Proof, prove
from kalshi_platform_tests.chaos.up import CLICKHOUSE, CODE_SERVER, DAEMON, Platform

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
MARKETS = 24


@dataclass(frozen=True)
class Kill:
    """One kill. Times are seconds since the epoch."""

    target: str
    at: float
    recovered_s: float | None
    """Seconds until frames came and ClickHouse had them; None: the next kill came first."""
    shards: frozenset[int] = frozenset()
    """Those whose living streamer was among what was killed."""


@dataclass
class Outcome:
    """What the campaign found."""

    kills: list[Kill]
    minutes: float
    proof: Proof
    unmarked_kills: int
    """Kills of the streamer without a `disconnected` row that gives cause and span."""
    hours_ended: int = 0
    """Ends of hours that the campaign went over: where parts are cut and hours are sealed."""
    journal_delay_s: list[float] = field(default_factory=list)
    """For each kill of the streamer: age of the last journalled frame at that moment."""

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        return self.proof.sound and not self.unmarked_kills


STREAMER, EVERYTHING = "streamer", "everything"
TARGETS = {
    STREAMER: 5,
    CLICKHOUSE: 4,
    f"{STREAMER} and {CODE_SERVER}": 3,
    CODE_SERVER: 2,
    DAEMON: 1,
    EVERYTHING: 3,
}
"""What is killed, and how often beside the others."""


def run(
    folder: Path,
    *,
    kills: int,
    seed: int,
    rate: float,
    shards: int = 1,
    say: Callable[[str], None],
) -> Outcome:
    """Run one campaign in an empty folder. Of several shards' streamers a kill takes one."""
    dice = random.Random(seed)
    began, hour = time.monotonic(), time.time() // 3600
    config = SimulatorConfig(
        markets=MARKETS, rolling_markets=0, rate=rate, seed=seed, key_file=folder / "key.pem"
    )
    with running(config) as simulator:
        it = Platform(folder, simulator, markets=MARKETS, shards=shards)
        it.start()
        try:
            it.wait(lambda: it.recovered(0.0), "the first recording")
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
            it.wait(lambda: it.recovered(0.0) and it.idle(), "the last frame to be stored")
            it.stop()
            outcome = _judge(it, simulator, done, (time.monotonic() - began) / 60)
            return replace(outcome, hours_ended=int(time.time() // 3600 - hour))
        finally:
            it.kill()


def _kill(it: Platform, dice: random.Random, *, wait: bool) -> Kill:
    names = list(TARGETS)
    victims: list[psutil.Process] = []
    while not victims:  # what is down already cannot be killed: choose another
        target = dice.choices(names, [TARGETS[n] for n in names])[0]
        victims = _victims(it, target, dice)
    pids = {p.pid for p in victims}
    shards = frozenset(shard for shard, pid in it.streamers().items() if pid in pids)
    at = time.time()
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    if target == EVERYTHING and it.process is not None:
        it.process.wait()
        it.start()
    if not wait:
        return Kill(target, at, None, shards)
    it.wait(lambda: it.recovered(at), f"recovery from the end of {target}")
    return Kill(target, at, time.time() - at, shards)


def _victims(it: Platform, target: str, dice: random.Random) -> list[psutil.Process]:
    """The processes that a kill of `target` ends."""
    if target == EVERYTHING:
        return it.family()
    found = it.programs(target, CODE_SERVER) if CODE_SERVER in target else it.programs(target)
    streamers = it.streamers() if STREAMER in target else {}
    one = dice.choice(list(streamers.values())) if streamers else None
    return found + [p for p in it.family() if p.pid == one]


def _judge(it: Platform, simulator: Simulator, kills: list[Kill], minutes: float) -> Outcome:
    proof = prove(it.settings, simulator)
    cut, delays = 0, []
    for shard in range(it.shards):
        folder = it.settings.journal_dir(shard)
        cut += _connections_cut(folder, kills)
        delays += _delays(folder, [k for k in kills if shard in k.shards])
    return Outcome(kills, minutes, proof, max(cut - proof.spans, 0), journal_delay_s=delays)


def _connections_cut(folder: Path, kills: list[Kill]) -> int:
    """How many connections of a journal were open at a kill: from `connected` to the next start."""
    ending = [k for k in kills if k.target == EVERYTHING or STREAMER in k.target]
    open_since: dict[bytes, int] = {}
    cut = 0
    for block in journal.blocks(folder, journal.beginning(folder)):
        notes = block.batch.to_pylist()
        for record in (r for r in notes if r["kind"] == Kind.NOTE):
            if b'"kind":"connected"' in record["frame"]:
                open_since[record["conn"]] = record["recv_ns"]
            elif b'"kind":"disconnected"' in record["frame"]:
                open_since.pop(record["conn"], None)
            elif b'"kind":"started"' in record["frame"]:
                cut += len(open_since)
                open_since.clear()
    return min(cut, len(ending)) if ending else cut


def _delays(folder: Path, kills: list[Kill]) -> list[float]:
    """Age of a journal's newest frame at each kill of its streamer whose connection was open."""
    spans: list[list[float]] = []  # of connections: the first frame, the last one, the end
    for block in journal.blocks(folder, journal.beginning(folder)):
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
        if recording:
            delays.append(kill.at - recording[-1][1])
    return [max(delay, 0.0) for delay in delays]


# -- the report --------------------------------------------------------------------------------


def report(outcome: Outcome, rate: float, seed: int, shards: int = 1) -> str:
    """The campaign as a page of the docs."""
    proof = outcome.proof
    by_target: Counter[str] = Counter(k.target for k in outcome.kills)
    lines = [
        "# Reliability",
        "",
        "What holds when anything is killed at any moment. This page is written by `make chaos`; the"
        " same campaign, shorter, is part of `make test`.",
        "",
        f"{len(outcome.kills)} kills (`kill -9`) in {outcome.minutes:.0f} minutes, {MARKETS} markets,"
        f" {rate:,.0f} deltas a second, {'one shard' if shards == 1 else f'{shards} shards'}, seed {seed};"
        f" version {__version__}, Python"
        f" {platform.python_version()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "| | |",
        "|---|---:|",
        f"| ends of hours within | {outcome.hours_ended} |",
        f"| frames in the journal | {proof.frames:,} |",
        f"| rows in ClickHouse, `orderbook_events` | {proof.rows_hot['orderbook_events']:,} |",
        f"| rows in Parquet, `orderbook_events` | {proof.rows_cold['orderbook_events']:,} |",
        f"| journalled frames lost | {proof.lost} |",
        f"| rows doubled | {proof.doubled} |",
        f"| numbers missing without a `gap` row | {proof.unexplained} |",
        f"| levels that differ from the exchange's books at the end | {proof.books_differ} |",
        f"| connections begun / ended by a row | {proof.connections} / {proof.ends} |",
        f"| interruptions without cause and span | {outcome.unmarked_kills} |",
        f"| gaps on an open connection | {proof.gaps} |",
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
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--report", type=Path, default=REPORT)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"Its data is in {folder}, and stays there unless all is well.")  # noqa: T201
    outcome = run(
        folder,
        kills=given.kills,
        seed=given.seed,
        rate=given.rate,
        shards=given.shards,
        say=lambda line: print(line, flush=True),  # noqa: T201
    )
    text = report(outcome, given.rate, given.seed, given.shards)
    given.report.write_text(text)
    print(text)  # noqa: T201
    if outcome.sound:
        shutil.rmtree(folder)
    sys.exit(0 if outcome.sound else 1)


if __name__ == "__main__":
    main()
