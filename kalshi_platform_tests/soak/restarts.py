"""Restart each part of the platform as an operator would, and measure the recovery."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from kalshi_platform.orchestration.observation import SHARD_TAG
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.chaos.up import (
    CLICKHOUSE,
    CODE_SERVER,
    DAEMON,
    PATIENCE_S,
    WEBSERVER,
    OutOfPatience,
    Platform,
)

_RUNS = """
query Runs($tags: [ExecutionTag!]) {
  runsOrError(filter: {pipelineName: "stream_orderbook", statuses: [STARTED], tags: $tags}) {
    ... on Runs { results { runId } }
  }
}
"""
_TERMINATE = """
mutation Terminate($run: String!) { terminateRun(runId: $run) { __typename } }
"""
_TICK = """
query Tick {
  sensorOrError(sensorSelector: {
    repositoryName: "__repository__"
    repositoryLocationName: "kalshi_platform"
    sensorName: "streamer_supervisor"
  }) {
    ... on Sensor { sensorState { ticks(limit: 1) { timestamp status } } }
  }
}
"""

Done = Callable[[], bool]
"""Whether the old process has ended, and a new one runs."""


class Dagster:
    """The web server of a platform, as its page uses it."""

    def __init__(self, platform: Platform) -> None:
        self._url = f"http://127.0.0.1:{platform.ui_port}/graphql"

    def terminate(self, shard: int) -> None:
        """Terminate the shard's run of `stream_orderbook`."""
        tags = [{"key": SHARD_TAG, "value": str(shard)}]
        runs = self._ask(_RUNS, tags=tags)["runsOrError"]["results"]
        for run in runs:
            self._ask(_TERMINATE, run=run["runId"])
        if not runs:
            raise OutOfPatience(f"Dagster knows no run that records shard {shard}")

    def supervises(self, since: float) -> bool:
        """Whether the page answers, and the supervisor has checked the streamers since then."""
        try:
            ticks = self._ask(_TICK)["sensorOrError"]["sensorState"]["ticks"]
        except (httpx.HTTPError, KeyError):
            return False  # it is just coming up
        return bool(ticks) and ticks[0]["timestamp"] > since and ticks[0]["status"] != "FAILURE"

    def _ask(self, query: str, **variables: Any) -> Any:
        body = {"query": query, "variables": variables}
        answer = httpx.post(self._url, json=body, timeout=30.0)
        answer.raise_for_status()
        return answer.json()["data"]


@dataclass(frozen=True)
class Part:
    """A part that is restarted, and how."""

    name: str
    how: str
    begin: Callable[[Platform, Simulator], Done]


@dataclass(frozen=True)
class Restart:
    """One restart, or one fault of the exchange. `at`: seconds since the epoch."""

    name: str
    how: str
    at: float
    recording_s: float | None
    """Seconds until the part runs again, frames come, every book is synced and both stores take rows."""
    supervised_s: float | None
    """Seconds until the page answers and the supervisor has checked the streamers; None: not in time."""
    trouble: str = ""
    """Why it did not recover."""

    @property
    def recovered(self) -> bool:
        """Whether everything recovered."""
        return self.recording_s is not None and self.supervised_s is not None

    @property
    def over(self) -> float:
        """When it was over, seconds since the epoch."""
        return self.at + max(self.recording_s or PATIENCE_S, self.supervised_s or PATIENCE_S)


def parts(shards: int) -> list[Part]:
    """Return all parts; first those that restart the streamers, so that the streamers then run long enough."""
    return [
        Part("everything", "Ctrl-C to `up`, and `up` again", _up),
        Part(CODE_SERVER, "SIGTERM; its runs, the streamers, end with it", _program(CODE_SERVER)),
        Part(CLICKHOUSE, "SIGTERM", _program(CLICKHOUSE)),
        *(
            Part(f"streamer of shard {n}", "its run terminated in Dagster", _streamer(n))
            for n in range(shards)
        ),
        Part(DAEMON, "SIGTERM", _program(DAEMON)),
        Part(WEBSERVER, "SIGTERM", _program(WEBSERVER)),
        Part(
            "the exchange's connections", "a reset of all (`drop`)", _fault("drop", "connections")
        ),
        Part(
            "the exchange's numbering", "3 deltas of each lost (`gap:3`)", _fault("gap:3", "gaps")
        ),
    ]


def restart(platform: Platform, simulator: Simulator, part: Part) -> Restart:
    """Restart a part, and wait for the recovery, up to `PATIENCE_S`."""
    dagster = Dagster(platform)
    at = time.time()
    done: Done
    replaced_at: float | None = None
    after: dict[str, float] = {}

    def back() -> bool:
        nonlocal replaced_at
        if replaced_at is None and done():
            replaced_at = time.time()
        if replaced_at is not None:
            for what, holds in (
                ("recording", platform.recovered),
                ("supervised", dagster.supervises),
            ):
                if what not in after and holds(replaced_at):
                    after[what] = time.time() - at
        return len(after) == 2

    trouble = ""
    try:
        done = part.begin(platform, simulator)
        platform.wait(back, f"recovery from the restart of {part.name}")
    except (OutOfPatience, httpx.HTTPError, subprocess.TimeoutExpired) as error:
        trouble = str(error)  # on the page; the soak continues
    recording_s, supervised_s = after.get("recording"), after.get("supervised")
    return Restart(part.name, part.how, at, recording_s, supervised_s, trouble)


def _up(platform: Platform, _: Simulator) -> Done:
    platform.stop()
    platform.start()
    return lambda: True


def _program(name: str) -> Callable[[Platform, Simulator], Done]:
    def begin(platform: Platform, _: Simulator) -> Done:
        former = platform.programs(name)
        for process in former:
            process.send_signal(signal.SIGTERM)
        gone = {process.pid for process in former}

        def done() -> bool:
            now = {process.pid for process in platform.programs(name)}
            return bool(now) and now.isdisjoint(gone)

        return done

    return begin


def _streamer(shard: int) -> Callable[[Platform, Simulator], Done]:
    def begin(platform: Platform, _: Simulator) -> Done:
        former = platform.streamers()[shard]
        Dagster(platform).terminate(shard)
        return lambda: platform.streamers().get(shard) not in {None, former}

    return begin


def _fault(fault: str, counted: str) -> Callable[[Platform, Simulator], Done]:
    """`counted`: the counter of each streamer's report that the fault increases by one."""

    def begin(platform: Platform, simulator: Simulator) -> Done:
        before = [health[counted] for health in platform.healths()]
        simulator.inject(fault)
        return lambda: all(
            health[counted] > was for was, health in zip(before, platform.healths(), strict=True)
        )

    return begin
