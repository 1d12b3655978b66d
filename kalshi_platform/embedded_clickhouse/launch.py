"""Start of the server's process, with its options and nothing else of the process that started it.

The command line replaces itself by `python -m kalshi_platform.embedded_clickhouse`, keeping its process id, so that
its parent can end it. The new program inherits only the outputs, and from the environment only language, time zone
and the paths of the interpreter's files; its options, including a configured password, arrive on stdin. So the
secrets of `.env` and of the environment are not in the memory of this process, and no SQL can read them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from kalshi_platform.errors import StoreError

_KEPT = (
    *("LANG", "LC_ALL", "LC_CTYPE", "TZ"),
    *("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
)
"""Environment variables that are inherited: language, time zone, and paths of the interpreter's files."""


@dataclass(frozen=True)
class Options:
    """The server's options."""

    path: str
    """The data folder, absolute."""
    host: str
    port: int
    """0: any free one."""
    user: str
    password: str | None = field(repr=False)
    """None: the password of the data folder for writing, none for reading (write_password.py). Empty: no password
    at all, for temporary folders of tests and benchmarks."""
    object_store: tuple[str, ...] = ()
    """URL prefixes below which `s3()` may read and write; empty: none."""
    log_format: str = "text"
    log_level: str = "INFO"


def replace_this_process(options: Options) -> NoReturn:
    """Replace this process by the server. Raises `StoreError` if the interpreter cannot be executed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe()
    os.write(writing, encoded(options))  # far below the capacity of a pipe
    os.close(writing)
    os.dup2(reading, 0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    try:
        os.execve(sys.executable, command(options.path), environment())  # noqa: S606 - our own program, no shell
    except OSError as error:
        raise StoreError(
            f"The embedded ClickHouse cannot be started: {sys.executable}: {error.strerror}."
            " Run `make install` again."
        ) from None


def command(path: str) -> list[str]:
    """The arguments; the path and the last word only show in a list of processes."""
    return [sys.executable, "-m", "kalshi_platform.embedded_clickhouse", path, "clickhouse"]


def environment() -> dict[str, str]:
    """The environment of the server's process."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ}


def encoded(options: Options) -> bytes:
    """Encode the options for the server's stdin."""
    return json.dumps(asdict(options)).encode()


def received(stdin: BinaryIO) -> Options:
    """Read the options that `encoded` made; stdin is at its end afterwards."""
    options = json.loads(stdin.read())
    return Options(**{**options, "object_store": tuple(options["object_store"])})


def absolute(path: Path) -> str:
    """A data folder's path for the options."""
    return str(path.expanduser().absolute())
