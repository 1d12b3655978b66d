"""The soak: a complete platform under a steady load, each part restarted once, then the proof.

`make soak` runs 30 minutes of it and writes `docs/soak.md`; it ends with 1 where a promise is broken.
The exchange is a simulator in this process, whose markets open and close all the time. Everything else
is one `kalshi-platform up` with two shards, on ports and a folder of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
import polars as pl

from kalshi_platform.archive import open_archive
from kalshi_platform.orchestration.metadata import partition_key
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running
from kalshi_platform_tests.chaos.proof import archived, prove
from kalshi_platform_tests.chaos.up import PATIENCE_S, OutOfPatience, Platform
from kalshi_platform_tests.chaos.up import folder as temporary
from kalshi_platform_tests.soak.outcome import Load, Markets, Outcome
from kalshi_platform_tests.soak.report import PAGE, write
from kalshi_platform_tests.soak.restarts import Restart, parts, restart
from kalshi_platform_tests.soak.samples import Sample, Sampler

LOAD = Load(minutes=30, rate=2_000, markets=200, rolling=40, rolling_s=120, shards=2, seed=1)
RESTARTS_END = 2 / 3
"""Share of the time in which the restarts take place; the rest shows whether memory is flat."""
LEAST_CALM_S = 60.0
"""Time after the last restart until the trade backfill is complete, which takes half a minute."""
Say = Callable[[str], None]


def run(load: Load, every_s: float, say: Say) -> Outcome:
    """Run one soak. Raises `OutOfPatience` if the platform does not start to record."""
    with (
        temporary("soak-") as folder,
        running(
            SimulatorConfig(
                markets=load.markets,
                rolling_markets=load.rolling,
                rolling_seconds=load.rolling_s,
                rate=load.rate,
                seed=load.seed,
                key_file=folder / "key.pem",
            )
        ) as simulator,
    ):
        platform = Platform(folder, simulator, markets=load.markets, shards=load.shards)
        platform.environment["MARKET_ALL"] = "1"
        sampler = Sampler(platform, simulator, every_s, lambda sample: say(_line(sample)))
        try:
            platform.start()
            platform.wait(lambda: platform.recovered(0.0), "the first recording")
            sampler.start()
            restarts = _restart_all(platform, simulator, sampler, load, say)
            doctor = _doctor(platform)
            sampler.stop()
            simulator.pause()
            _settle(platform, say)
            platform.stop()
            say("Everything has ended; now the proof.")
            return _judge(platform, simulator, sampler, load=load, restarts=restarts, doctor=doctor)
        finally:
            platform.kill()


def _restart_all(
    platform: Platform, simulator: Simulator, sampler: Sampler, load: Load, say: Say
) -> list[Restart]:
    """Restart each part in turn; a recovery that takes longer than its share delays the next."""
    began = time.time()
    every = parts(load.shards)
    apart_s = load.minutes * 60 * RESTARTS_END / len(every)
    done = []
    for number, part in enumerate(every):
        sampler.sleep_until(began + (number + 0.5) * apart_s)
        say(f"{part.name}: {part.how}")
        done.append(restart(platform, simulator, part))
        one = done[-1]
        say(
            f"{part.name}: recording again in {one.recording_s:.1f} s, supervised in {one.supervised_s:.1f} s"
            if one.recording_s is not None and one.supervised_s is not None
            else f"{part.name}: NOT recovered. {one.trouble}"
        )
    sampler.sleep_until(max(began + load.minutes * 60, time.time() + LEAST_CALM_S))
    return done


def _doctor(platform: Platform) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kalshi_platform", "doctor"]
    try:
        return subprocess.run(
            command,
            cwd=platform.data.parent,
            env=platform.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 1, str(error))


def _settle(platform: Platform, say: Say) -> None:
    """Wait until the last frames are stored; the proof counts frames that are not stored in time."""
    time.sleep(2.0)
    try:
        platform.wait(platform.idle, "the last frame to be stored")
    except OutOfPatience as error:
        say(str(error))


def _judge(
    platform: Platform,
    simulator: Simulator,
    sampler: Sampler,
    *,
    load: Load,
    restarts: list[Restart],
    doctor: subprocess.CompletedProcess[str],
) -> Outcome:
    settings = platform.settings
    stream = archived(settings, "stream_events")
    of = {
        kind: set(
            stream.filter(pl.col("kind") == kind)
            .select("market_ticker")
            .unique()
            .collect()
            .to_series()
        )
        for kind in ("snapshot", "left")
    }
    trades = set(archived(settings, "trades").select("trade_id").collect().to_series())
    last_trades = simulator.trades()
    archive = open_archive(settings)
    sealed = [
        hour
        for hour in archive.hours("orderbook_events")
        if (manifest := archive.read_manifest("orderbook_events", hour)) and manifest.complete
    ]
    seen = sampler.seen_open
    at_first = sampler.first_open
    return Outcome(
        load=load,
        samples=sampler.samples,
        restarts=restarts,
        shed_s=simulator.state()["shed_seconds"],
        proof=prove(settings, simulator),
        markets=Markets(
            opened=len(seen.keys() - at_first),
            recorded=len(of["snapshot"]),
            left=len(of["left"]),
            missed=frozenset(ticker for ticker, looks in seen.items() if looks > 1)
            - of["snapshot"],
        ),
        trades_missing=len(last_trades.keys() - trades),
        trades_looked_at=len(last_trades),
        hours_sealed=[partition_key(hour) for hour in sealed],
        doctor_exit=doctor.returncode,
        doctor=doctor.stdout.splitlines(),
    )


def _line(sample: Sample) -> str:
    memory = ", ".join(
        f"{role} {mib:,.0f}" for role, mib in sorted(sample.mib.items(), key=lambda of: -of[1])[:4]
    )
    lag = ", ".join(f"{store} {records:,}" for store, records in sample.lag.items())
    return (
        f"{sample.journalled:,} journalled, {sample.followed}/{sample.open_markets} markets;"
        f" behind: {lag or '-'}; MiB: {memory}"
    )


@click.command(help=__doc__)
@click.option("--minutes", default=LOAD.minutes, show_default=True, type=click.FloatRange(min=1.0))
@click.option("--rate", default=LOAD.rate, show_default=True, help="Deltas a second.")
@click.option("--seed", default=LOAD.seed, show_default=True)
@click.option("--every", default=5.0, show_default=True, help="Seconds between two looks.")
@click.option(
    "--report",
    "path",
    default=PAGE,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page; its picture goes into `images` beside it.  [default: docs/soak.md]",
)
def main(minutes: float, rate: float, seed: int, every: float, path: Path) -> None:
    """Run it, write the page."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, ends what was started

    def say(line: str) -> None:
        click.echo(f"{datetime.now(UTC):%H:%M:%S}  {line}")

    outcome = run(replace(LOAD, minutes=minutes, rate=rate, seed=seed), every, say)
    click.echo(write(outcome, path))
    sys.exit(0 if outcome.sound else 1)


if __name__ == "__main__":
    main()
