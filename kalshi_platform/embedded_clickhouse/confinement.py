"""Confinement of this process by the kernel: Linux's Landlock and seccomp.

The engine was built as a command-line tool: it opens any file that its user can read, starts programs and connects
to any host. Here the kernel forbids that, for the whole process and irrevocably:

- files (Landlock): the data folder may be changed; libraries, time zones and certificates may be read;
- programs, other processes, sockets (seccomp): none; see system_calls.py;
- with an object store, TCP connections to its port (Landlock from Linux 6.7 on), on any host, since the kernel
  compares no names. The host is restricted by the engine's access rights and by permission.py.

Landlock's calls and constants: `linux/landlock.h`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from kalshi_platform.embedded_clickhouse import system_calls

log = logging.getLogger(__name__)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH, _NET_PORT = 1, 2
_NO_NEW_PRIVILEGES = 38
_OLDEST_ABI = 2
"""The first Landlock version that permits renames between folders, which the engine needs."""

_ABI_OF_NETWORK, _ABI_OF_SCOPES = 4, 6
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1
_WITHOUT_KERNEL = "the kernel does not keep SQL from files, programs and connections of this user"

_WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_EXECUTE, _ANYTHING_ABI_2 = 1 << 0, (1 << 14) - 1
_ON_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _READ_FILE | _READ_FOLDER
"""Without execution: libraries are only mapped."""

_SYSTEM = ("/usr", "/lib", "/lib64", "/sys/devices/system/cpu", "/sys/fs/cgroup")
_SYSTEM_FILES = (
    *("/etc/localtime", "/etc/timezone", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"),
    *("/etc/ld.so.cache", "/etc/ssl", "/dev/urandom", "/dev/random"),
    *("/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/proc/loadavg"),
    # this process's own, but not its environment, which may hold passwords
    *(
        "/proc/self/auxv",
        "/proc/self/maps",
        "/proc/self/statm",
        "/proc/self/stat",
        "/proc/self/status",
    ),
    *("/proc/self/mounts", "/proc/self/mountinfo", "/proc/self/cgroup", "/proc/self/io"),
)


def confine(data: Path, ports: Iterable[int] = ()) -> None:
    """Irrevocably restrict this process: it may change files in `data` only and start no program.

    `ports` are those of the configured object store; without any, no socket can be created. Call it before the
    engine is loaded, while there is one thread, and after every listening socket is open. If the system lacks a
    mechanism, a warning in the log names the consequence.
    """
    allowed = frozenset(ports)
    if sys.platform != "linux":
        log.warning("%s: %s", sys.platform, _WITHOUT_KERNEL)
        return
    try:
        _restrict_files(data, allowed)
    except OSError as error:
        log.warning("%s: the kernel does not keep SQL from the files of this user", error)
    try:
        system_calls.restrict(network=bool(allowed))
    except OSError as error:
        log.warning("%s: the kernel does not keep SQL from programs and connections", error)


def _restrict_files(data: Path, ports: frozenset[int]) -> None:
    """Build and apply the Landlock ruleset for files, ports and signals."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    if abi < _OLDEST_ABI:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    handled = _ANYTHING_ABI_2 | (_TRUNCATE if abi > _OLDEST_ABI else 0)
    network = _BIND_TCP | _CONNECT_TCP if abi >= _ABI_OF_NETWORK else 0
    scoped = _ABSTRACT_SOCKETS | _SIGNALS if abi >= _ABI_OF_SCOPES else 0
    size = 24 if scoped else 16 if network else 8
    attributes = struct.pack("QQQ", handled, network, scoped)[:size]
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, size, 0))
    try:
        for path in _readable():
            _allow(libc, ruleset, path, _READ)
        _allow(libc, ruleset, Path(os.devnull), (_WRITE_FILE | _READ_FILE | _TRUNCATE) & handled)
        _allow(libc, ruleset, data, handled & ~_EXECUTE)
        for port in ports if network else ():
            rule = struct.pack("=QQ", _CONNECT_TCP, port)
            _checked(libc.syscall(_ADD_RULE, ruleset, _NET_PORT, rule, 0))
        _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _readable() -> Iterable[Path]:
    package = Path(__file__).resolve().parents[1]
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
