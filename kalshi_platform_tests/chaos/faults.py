"""The faults that the campaign causes on a running platform, one at a time, drawn at random.

A fault begins at once and ends after a hold; `begin` returns what ends it, or None where the fault does
not apply at the moment (another one is drawn then). Faults that need the right to mount, or a compiler,
are left out where those are missing; the report says so.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.chaos import disks
from kalshi_platform_tests.chaos.up import CLICKHOUSE, CODE_SERVER, DAEMON, Platform

STREAMER, EVERYTHING = "streamer", "everything"
SHIM = Path(__file__).with_name("slow_fsync.c")
SLOW_FSYNC = "slow_fsync.ms"

End = Callable[[], None]


@dataclass(frozen=True)
class Scene:
    """What a fault can reach."""

    platform: Platform
    simulator: Simulator
    disks: Mapping[str, Path]
    """Folders with a small file system of their own, by content."""
    dice: random.Random
    killed: dict[int, float] = field(default_factory=dict)
    """The processes that the current fault has killed, and when each was."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `hold_s`: the least and the longest time until it ends."""

    group: str
    """kill, state, stall, exchange or disk."""
    name: str
    weight: int
    begin: Callable[[Scene], End | None]
    hold_s: tuple[float, float] = (0.0, 0.0)


def faults(*, mounts: bool, slow_fsync: bool) -> list[Fault]:
    """Return the faults that are possible here."""
    found = [
        *(Fault("kill", name, weight, partial(_kill, name)) for name, weight in KILLS.items()),
        *(
            Fault("state", f"{STREAMER}, {what}", 1, partial(_state, act))
            for what, act in _STATE.items()
        ),
        Fault("state", "lock file removed", 1, _lock_removed),
        Fault("stall", "streamer stopped (SIGSTOP)", 2, partial(_stopped, STREAMER), (1.0, 8.0)),
        Fault(
            "stall", "ClickHouse stopped (SIGSTOP)", 2, partial(_stopped, CLICKHOUSE), (1.0, 8.0)
        ),
        *(
            Fault("exchange", f"exchange: {what}", 1, partial(_exchange, what))
            for what in _EXCHANGE
        ),
    ]
    if mounts:
        for what in DISKS:
            found.append(Fault("disk", f"{what}'s disk full", 3, partial(_full, what), (2.0, 12.0)))
            found.append(
                Fault("disk", f"{what}'s folder away", 2, partial(_away, what), (2.0, 8.0))
            )
    if slow_fsync:
        found.append(Fault("disk", "slow fsync", 4, _slow_fsync, (3.0, 12.0)))
    return found


# -- kills -------------------------------------------------------------------------------------

KILLS = {
    STREAMER: 5,
    CLICKHOUSE: 4,
    f"{STREAMER} and {CODE_SERVER}": 3,
    CODE_SERVER: 2,
    DAEMON: 1,
    EVERYTHING: 3,
}
"""What is killed (`kill -9`), and its weight."""


def _kill(target: str, scene: Scene) -> End | None:
    platform = scene.platform
    victims = _victims(platform, target, scene.dice)
    if not victims:
        return None
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            scene.killed[victim.pid] = time.time()
    if target == EVERYTHING and platform.process is not None:
        platform.process.wait()
        platform.start()
    return _nothing


def _victims(platform: Platform, target: str, dice: random.Random) -> list[psutil.Process]:
    """The processes that a kill of `target` ends; of several streamers one."""
    if target == EVERYTHING:
        return platform.family()
    programs = (target, CODE_SERVER) if CODE_SERVER in target else (target,)
    found = platform.programs(*programs)
    streamers = platform.streamers() if STREAMER in target else {}
    one = dice.choice(list(streamers.values())) if streamers else None
    return found + [p for p in platform.family() if p.pid == one]


# -- state files: taken away or altered while a kill ends their writer ---------------------------


def _state(act: Callable[[Path, random.Random], bool], scene: Scene) -> End | None:
    """Kill a streamer, then do something to the state files of its shard."""
    streamers = scene.platform.streamers()
    running = {p.pid: p for p in scene.platform.family()}
    alive = {shard: running[pid] for shard, pid in streamers.items() if pid in running}
    if not alive:
        return None
    shard = scene.dice.choice(sorted(alive))
    with contextlib.suppress(psutil.NoSuchProcess):
        alive[shard].kill()
        scene.killed[alive[shard].pid] = time.time()
        alive[shard].wait(5.0)
    folder = scene.platform.settings.journal_dir(shard)
    return _nothing if act(folder, scene.dice) else None


def _cursor_removed(folder: Path, dice: random.Random) -> bool:
    _cursor(folder, dice).unlink(missing_ok=True)
    return True


def _cursor_altered(folder: Path, dice: random.Random) -> bool:
    path = _cursor(folder, dice)
    if not path.exists():
        return False
    text = path.read_text()
    digits = [match.start() for match in re.finditer(r"\d", text)]
    at = dice.choice(digits)
    other = dice.choice([d for d in "0123456789" if d != text[at]])
    path.write_text(text[:at] + other + text[at + 1 :])
    return True


def _cursors_swapped(folder: Path, _dice: random.Random) -> bool:
    one, other = folder / "load" / "clickhouse.json", folder / "load" / "parquet.json"
    if not (one.exists() and other.exists()):
        return False
    hot, cold = one.read_bytes(), other.read_bytes()
    one.write_bytes(cold)
    other.write_bytes(hot)
    return True


def _load_folder_removed(folder: Path, _dice: random.Random) -> bool:
    shutil.rmtree(folder / "load", ignore_errors=True)
    return True


def _identity_removed(folder: Path, _dice: random.Random) -> bool:
    (folder / "journal.json").unlink(missing_ok=True)
    return True


def _cursor(folder: Path, dice: random.Random) -> Path:
    return folder / "load" / dice.choice(["clickhouse.json", "parquet.json"])


_STATE: Mapping[str, Callable[[Path, random.Random], bool]] = {
    "a cursor removed": _cursor_removed,
    "a digit of a cursor altered": _cursor_altered,
    "cursors swapped": _cursors_swapped,
    "load folder removed": _load_folder_removed,
    "journal.json removed": _identity_removed,
}


def _lock_removed(scene: Scene) -> End | None:
    shard = scene.dice.randrange(scene.platform.shards)
    path = scene.platform.settings.journal_dir(shard) / "lock"
    if not path.exists():
        return None
    path.unlink()
    return _nothing


# -- processes that stand still, the exchange ----------------------------------------------------


def _stopped(target: str, scene: Scene) -> End | None:
    victims = _victims(scene.platform, target, scene.dice)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGSTOP)

    def end() -> None:
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)

    return end if victims else None


_EXCHANGE = ("drop", "gap:3", "trade_gap", "hang:5")


def _exchange(what: str, scene: Scene) -> End:
    scene.simulator.inject(what)
    return _nothing


# -- disks -------------------------------------------------------------------------------------

DISKS = {"ClickHouse": 3000, "journal": 1500, "archive": 1000}
"""Size of each store's own file system, MiB."""


def _full(what: str, scene: Scene) -> End | None:
    folder = scene.disks[what]
    disks.fill(folder)
    return partial(disks.make_room, folder)


def _away(what: str, scene: Scene) -> End | None:
    folder = scene.disks[what]
    disks.hide(folder)
    return partial(disks.show, folder)


def _slow_fsync(scene: Scene) -> End:
    path = Path(scene.platform.environment["SLOW_FSYNC_MS"])
    path.write_text(str(scene.dice.choice([20, 40, 100, 400])))
    return lambda: path.unlink(missing_ok=True)


def slow_fsync_environment(folder: Path) -> dict[str, str] | None:
    """Build the preloaded library in `folder`; the environment that uses it, or None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.name != "posix":
        return None
    library = folder / "slow_fsync.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(SHIM), "-ldl"]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        return None
    return {"LD_PRELOAD": str(library), "SLOW_FSYNC_MS": str(folder / SLOW_FSYNC)}


def _nothing() -> None:
    """The end of a fault that ends by itself."""
