"""What this process may touch on the host, where the kernel can be told: Linux's Landlock.

The engine was born as a command-line tool and opens any file that its user can read, for instance
with `file()`. A ClickHouse server would confine that to one folder. Here the kernel does it, for
the whole process and for good: the data folder may be changed, programs and time zones be read.
System calls and constants: `linux/landlock.h`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH = 1
_NO_NEW_PRIVILEGES = 38
_OLDEST_ABI = 2
"""The first that lets a process rename between folders, as the engine does all the time."""

_WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_ANYTHING_ABI_2 = (1 << 14) - 1
_ON_FILES = (1 << 0) | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = (1 << 0) | _READ_FILE | _READ_FOLDER

_SYSTEM = ("/usr", "/lib", "/lib64", "/sys/devices/system/cpu", "/sys/fs/cgroup")
_SYSTEM_FILES = (
    *("/etc/localtime", "/etc/timezone", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"),
    *("/etc/ld.so.cache", "/etc/ssl", "/dev/urandom", "/dev/random"),
    *("/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/proc/loadavg"),
    # of this process, yet not its environment, which may hold passwords
    *(
        "/proc/self/auxv",
        "/proc/self/maps",
        "/proc/self/statm",
        "/proc/self/stat",
        "/proc/self/status",
    ),
    *("/proc/self/mounts", "/proc/self/mountinfo", "/proc/self/cgroup", "/proc/self/io"),
)


def confine(data: Path) -> bool:
    """From now on let this thread, and every thread it starts, change files in `data` only.

    Call it before the engine is loaded. Returns False, and says so in the log, on a system that
    cannot do it. It cannot be taken back.
    """
    if sys.platform != "linux":
        log.info(
            "no Landlock on %s: the engine can read every file that this user can", sys.platform
        )
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    if abi < _OLDEST_ABI:
        log.info("this kernel has no Landlock: the engine can read every file that this user can")
        return False
    try:
        _restrict(libc, data, _ANYTHING_ABI_2 | (_TRUNCATE if abi > _OLDEST_ABI else 0))
    except OSError as error:
        log.warning("%s: the engine can read every file that this user can", error)
        return False
    return True


def _restrict(libc: ctypes.CDLL, data: Path, handled: int) -> None:
    attributes = struct.pack("Q", handled)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for path in _readable():
            _allow(libc, ruleset, path, _READ)
        _allow(libc, ruleset, Path(os.devnull), (_WRITE_FILE | _READ_FILE | _TRUNCATE) & handled)
        _allow(libc, ruleset, data, handled)
        _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _readable() -> Iterable[Path]:
    package = Path(__file__).resolve().parents[2]
    imports = {Path(entry) for entry in sys.path if entry.endswith(("-packages", "lib-dynload"))}
    interpreter = {Path(sys.base_prefix) / "lib", Path(sys.prefix) / "lib"}
    system = {Path(name) for name in (*_SYSTEM, *_SYSTEM_FILES)}
    return (path for path in {package} | imports | interpreter | system if path.exists())


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, access: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = access if path.is_dir() else access & _ON_FILES
        rule = struct.pack("=Qi", allowed, opened)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(opened)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
