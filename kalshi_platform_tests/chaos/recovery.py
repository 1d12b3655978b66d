"""For how long nothing is recorded: after a streamer's process is killed, and when STREAM_SHARDS changes.

`python -m kalshi_platform_tests.chaos.recovery` measures both under a `kalshi-platform up` of its own; `--busy 2`
beside so many processes that do nothing but compute. Ends with 1 where the promise is broken. Between two
measurements it waits until a streamer has recorded for a minute: one that is killed before is replaced later.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.orchestration.supervisor import KILLED_S
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import running
from kalshi_platform_tests.chaos.up import Platform
from kalshi_platform_tests.chaos.up import folder as temporary

PROMISED_S = 10.0
"""On an idle machine."""
MARKETS = 24
SETTLED_S = KILLED_S + 5.0


def off_s(folders: Sequence[Path], since: float) -> float:
    """How long after `since` (seconds since the epoch) the last of the journals got a frame again."""
    return max(_first_frame(folder, since) for folder in folders) - since


def _first_frame(folder: Path, since: float) -> float:
    """When a journal got its first frame after that moment; infinite where none has come."""
    for block in reader.record_ranges(folder, reader.oldest_offset(folder)):
        for record in block.batch.select(["recv_ns", "kind"]).to_pylist():
            if record["recv_ns"] / 1e9 > since and record["kind"] != Kind.NOTE:
                return float(record["recv_ns"] / 1e9)
    return float("inf")


def kill(platform: Platform) -> float:
    """Kill the streamer of shard 0; when."""
    os.kill(platform.streamers()[0], signal.SIGKILL)
    return time.time()


def set_shards(platform: Platform) -> None:
    """Say in `.env`, which `up` begins with, how many there are to be."""
    (platform.data.parent / ".env").write_text(f"STREAM_SHARDS={platform.shards}\n")


def change(platform: Platform, shards: int) -> float:
    """Set STREAM_SHARDS in `.env`; the time of the former streamers' last frame, once all are replaced."""
    former = platform.streamers()
    platform.shards = shards
    set_shards(platform)
    last = 0.0

    def replaced() -> bool:
        nonlocal last
        now = {int(health["pid"]): health for health in platform.healths() if health}
        last = max(
            [last, *(now[pid]["last_frame_ns"] / 1e9 for pid in former.values() if pid in now)]
        )
        return bool(now) and now.keys().isdisjoint(former.values())

    platform.wait(replaced, f"{shards} shards")
    return last


def measure(
    platform: Platform, kills: int, changes: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Each so often, one after the other; seconds without a frame."""
    found: dict[str, list[float]] = {"kill": [], "change of STREAM_SHARDS": []}
    for number in range(kills + changes):
        platform.wait(lambda: platform.recovered(0.0), "every book")
        time.sleep(SETTLED_S)
        what = "kill" if number < kills else "change of STREAM_SHARDS"
        at = kill(platform) if number < kills else change(platform, 3 - platform.shards)
        platform.wait(partial(platform.recovered, at), "the recording")
        shards = (0,) if number < kills else range(platform.shards)
        found[what].append(off_s([platform.settings.journal_dir(shard) for shard in shards], at))
        say(f"{what}: {found[what][-1]:.1f} s")
    return found


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute."""
    started = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--changes", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rate", type=float, default=500.0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, ends what was started
    os.environ["KALSHI_HOME"] = "."
    with (
        temporary("recovery-") as folder,
        running(
            SimulatorConfig(
                markets=MARKETS, rolling_markets=0, rate=given.rate, key_file=folder / "key.pem"
            )
        ) as simulator,
    ):
        platform = Platform(folder, simulator, markets=MARKETS)
        del platform.environment["STREAM_SHARDS"]
        set_shards(platform)
        try:
            platform.start()
            with busy(given.busy):
                found = measure(platform, given.kills, given.changes, _say)
        finally:
            platform.kill()
    for what, seconds in found.items():
        if seconds:
            _say(
                f"{what}: p50 {statistics.median(seconds):.1f} s, max {max(seconds):.1f} s of"
                f" {len(seconds)} (promised on an idle machine: {PROMISED_S:.0f} s)"
            )
    sys.exit(0 if all(s <= PROMISED_S for seconds in found.values() for s in seconds) else 1)


if __name__ == "__main__":
    main()
