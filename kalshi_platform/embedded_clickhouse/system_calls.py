"""A filter of this process's system calls: seccomp on Linux.

A filter is a program for the kernel's BPF machine, which receives the number and the arguments of each call. This
one permits everything that a database needs, and refuses calls that would act outside of the process:

- starting a program (execve) or a process (fork; threads are permitted);
- access to other processes: signals, ptrace, their memory, their descriptors;
- sockets: none at all, or only internet sockets if an object store is configured;
- calls of an administrator, in case it runs as one: mounts, modules, namespaces, keys, BPF;
- io_uring, which can do all of that without calls, and calls that are newer than this list.

A refused call fails with EPERM; a call that is too new fails with ENOSYS, so that the C library uses an older call
instead. Numbers: `asm/unistd.h`; the machine: `linux/seccomp.h`, `linux/filter.h`, `linux/audit.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_NO_NEW_PRIVILEGES = 38
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets into `struct seccomp_data`; arguments have eight bytes each, the low half first."""
_CLONE_THREAD = 0x00010000
_NEWEST = 462
"""The highest reviewed number: `mseal`, of Linux 6.10."""

_REFUSED = (
    *("execve", "execveat", "fork", "vfork"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
    *("pidfd_open", "pidfd_getfd", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    *("tkill", "bind"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "open_tree", "move_mount"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "open_by_handle_at"),
    *("bpf", "perf_event_open", "userfaultfd", "fanotify_init", "quotactl", "acct", "reboot"),
    *("add_key", "request_key", "keyctl", "init_module", "finit_module", "delete_module"),
    *("kexec_load", "kexec_file_load", "swapon", "swapoff"),
)
_SAME_EVERYWHERE = {
    **{"pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440},
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435},
    **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
    **{"fspick": 433, "mount_setattr": 442},
}


@dataclass(frozen=True)
class Architecture:
    """The system-call numbers of a processor architecture."""

    audit: int
    """Its number in `struct seccomp_data`."""
    seccomp: int
    """The call that sets a filter."""
    numbers: Mapping[str, int]


X86_64 = Architecture(
    0xC000003E,
    317,
    _SAME_EVERYWHERE
    | {"execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "clone": 56, "socket": 41}
    | {"connect": 42, "bind": 49, "kill": 62, "tkill": 200, "tgkill": 234, "ptrace": 101}
    | {"rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "kcmp": 312, "process_vm_readv": 310}
    | {"process_vm_writev": 311, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161}
    | {"setns": 308, "unshare": 272, "open_by_handle_at": 304, "bpf": 321, "quotactl": 179}
    | {"perf_event_open": 298, "userfaultfd": 323, "fanotify_init": 300, "acct": 163}
    | {"reboot": 169, "add_key": 248, "request_key": 249, "keyctl": 250, "init_module": 175}
    | {"finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320}
    | {"swapon": 167, "swapoff": 168},
)
AARCH64 = Architecture(
    0xC00000B7,
    277,
    _SAME_EVERYWHERE
    | {"execve": 221, "execveat": 281, "clone": 220, "socket": 198, "connect": 203, "bind": 200}
    | {"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "ptrace": 117}
    | {"rt_tgsigqueueinfo": 240, "kcmp": 272, "process_vm_readv": 270, "process_vm_writev": 271}
    | {"mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97}
    | {"open_by_handle_at": 265, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282}
    | {"fanotify_init": 262, "quotactl": 60, "acct": 89, "reboot": 142, "add_key": 217}
    | {"request_key": 218, "keyctl": 219, "init_module": 105, "finit_module": 273}
    | {"delete_module": 106, "kexec_load": 104, "kexec_file_load": 294, "swapon": 224}
    | {"swapoff": 225},
)
ARCHITECTURES = {"x86_64": X86_64, "aarch64": AARCH64}


def restrict(*, network: bool) -> None:
    """Set the filter irrevocably for every thread of this process.

    Raises `OSError` if the kernel or the container does not accept it.
    """
    own = ARCHITECTURES.get(platform.machine())
    if own is None:
        raise OSError(errno.ENOSYS, f"seccomp: no list of system calls for {platform.machine()}")
    code = program(own, process=os.getpid(), network=network)
    instructions = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        libc.syscall(own.seccomp, _SET_MODE_FILTER, _ALL_THREADS, described),
    ):
        if done != 0:  # above 0: a thread that has its own filter
            number = ctypes.get_errno() or errno.EPERM
            raise OSError(number, f"seccomp: {os.strerror(number)}")


def program(own: Architecture, *, process: int, network: bool) -> bytes:
    """The filter's instructions, eight bytes each."""
    number = own.numbers
    refuse, missing = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, own.audit),
        (_RETURN, 0, 0, refuse),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, _NEWEST),
        (_RETURN, 0, 0, missing),
        (_EQUAL, 0, 1, number["clone3"]),  # its flags are in memory, which a filter cannot read
        (_RETURN, 0, 0, missing),
    ]
    refused = [*_REFUSED, *(() if network else ("socket", "connect"))]
    for name in refused:
        if name in number:
            steps += [(_EQUAL, 0, 1, number[name]), (_RETURN, 0, 0, refuse)]
    thread = (_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 1, 0, _CLONE_THREAD)
    own_process = (_LOAD, 0, 0, _ARGUMENTS), (_EQUAL, 1, 0, process)
    internet = (
        (_LOAD, 0, 0, _ARGUMENTS),
        (_EQUAL, 2, 0, socket.AF_INET),
        (_EQUAL, 1, 0, socket.AF_INET6),
    )
    for name, test in (
        ("clone", thread),
        ("kill", own_process),
        ("tgkill", own_process),
        ("socket", internet),
    ):
        # skip the test for other calls; the test skips the refusal if the call is permitted
        steps += [(_EQUAL, 0, len(test) + 2, number[name]), *test]
        steps += [(_RETURN, 0, 0, refuse), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)
