"""How the server's process begins: with its options and nothing else of the process that started it.

The command line replaces itself by `python -m kalshi_platform.embedded_clickhouse` (same process id, so
that whoever started it can end it). The new program has no environment but language, time zone and how
to find the interpreter's own files, and no descriptors but its outputs; its options, with a configured
password, come on its stdin. So no SQL, whatever it finds, can read the secrets of `.env` or of the environment:
they are not in this process's memory.
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
"""Of the environment: language, time zone, and where the interpreter finds its files."""


@dataclass(frozen=True)
class Options:
    """What the server is started with."""

    path: str
    """The data folder, absolute."""
    host: str
    port: int
    """0: any free one."""
    user: str
    password: str | None = field(repr=False)
    """None: the one in the data folder, and reading needs none (write_password.py). Empty: none is asked
    for, as on the throw-away folders of tests and benchmarks."""
    object_store: tuple[str, ...] = ()
    """URL prefixes that `s3()` may read and write below; empty: none."""
    log_format: str = "text"
    log_level: str = "INFO"


def replace_this_process(options: Options) -> NoReturn:
    """Become the server. Raises `StoreError` where the interpreter cannot be executed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe()
    os.write(writing, sent(options))  # far below what a pipe holds
    os.close(writing)
    os.dup2(reading, 0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    try:
        os.execve(sys.executable, command(options.path), environment())  # noqa: S606 - ourselves, no shell
    except OSError as error:
        raise StoreError(
            f"The embedded ClickHouse cannot be started: {sys.executable}: {error.strerror}."
            " Run `make install` again."
        ) from None


def command(path: str) -> list[str]:
    """The arguments; the path and the last word are for people who look at a list of processes."""
    return [sys.executable, "-m", "kalshi_platform.embedded_clickhouse", path, "clickhouse"]


def environment() -> dict[str, str]:
    """What the server's process gets of this one's environment."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ}


def sent(options: Options) -> bytes:
    """The options as the server reads them from its stdin."""
    return json.dumps(asdict(options)).encode()


def received(stdin: BinaryIO) -> Options:
    """The options that `sent` made; stdin is at its end afterwards."""
    options = json.loads(stdin.read())
    return Options(**{**options, "object_store": tuple(options["object_store"])})


def absolute(path: Path) -> str:
    """A data folder as the options have it."""
    return str(path.expanduser().absolute())
