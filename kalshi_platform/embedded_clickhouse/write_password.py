"""The password for writing to the embedded ClickHouse: a file in its data folder.

The server generates it before it listens for the first time; every command of the platform reads it when it connects
to the embedded ClickHouse, and never sends it to another server. CLICKHOUSE_PASSWORD replaces it on both sides, and
then no file is written or read.

The password is in no database: if the file is removed, the server generates a new one at its next start.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shlex
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from kalshi_platform import durable
from kalshi_platform.errors import StoreRefused

log = logging.getLogger(__name__)

NAME = "password"
BYTES = 32
"""Bytes of randomness."""
_PASSWORD = re.compile(rb"[!-~]{16,256}")
ANOTHER = "remove it and start the embedded ClickHouse again, which makes a new one"
READ_ONLY = (
    "without a password there is only reading. To write, give the password that is in the file"
    f" `{NAME}` of the data folder (KALSHI_DATA_DIR/clickhouse); the platform's own commands find it"
    " by themselves. Where that file is gone, start the embedded ClickHouse again, which makes a new one."
    " CLICKHOUSE_PASSWORD sets another one, which reading needs, too"
)


def read(folder: Path) -> str | None:
    """The password in a data folder; None if there is no file.

    Raises `StoreRefused` for a file that holds no password, or that other users can read.
    """
    path = folder / NAME
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreRefused(_unusable(path, "is a symbolic link", ANOTHER)) from None
        raise StoreRefused(
            _unusable(
                path,
                f"cannot be read ({error.strerror})",
                "make it this user's (chown, chmod 600), or run this command as the user who has it",
            )
        ) from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise StoreRefused(_unusable(path, "is not a regular file", ANOTHER))
        if mode := stat.S_IMODE(status.st_mode) & 0o077:
            raise StoreRefused(
                _unusable(
                    path,
                    f"is open to other users of this machine (mode {mode | 0o600:04o})",
                    f"chmod 600 {shlex.quote(str(path))}; if one of them may have read it, {ANOTHER}. On a file"
                    " system without modes set CLICKHOUSE_PASSWORD",
                )
            )
        content = os.read(file, 4096).removesuffix(b"\n")
    except OSError as error:
        raise StoreRefused(_unusable(path, f"cannot be read ({error.strerror})", ANOTHER)) from None
    finally:
        os.close(file)
    if not _PASSWORD.fullmatch(content):
        fault = (
            "is empty" if not content.strip() else "holds no password (16 to 256 ASCII characters)"
        )
        raise StoreRefused(_unusable(path, fault, ANOTHER))
    return content.decode("ascii")


def read_or_make(folder: Path) -> str:
    """The password in a data folder, generated if there is none.

    Raises `StoreRefused` as `read` does, and if the file cannot be written.
    """
    if (found := read(folder)) is not None:
        return found
    if (folder / "engine").exists():
        log.warning(
            "%s is missing, though the folder was in use before: a new password is generated. Programs with"
            " the old one must connect again",
            folder / NAME,
        )
    try:
        _make(folder)
    except OSError as error:
        raise StoreRefused(
            f"The password file {folder / NAME} cannot be written ({error.strerror}). Correct the folder's"
            " permissions or its disk, or set CLICKHOUSE_PASSWORD."
        ) from None
    made = read(folder)  # another process may have been first
    if made is None:
        raise StoreRefused(
            f"The password file {folder / NAME} was removed while it was made. Start the embedded"
            " ClickHouse again."
        )
    return made


def _make(folder: Path) -> None:
    """Write a new password atomically, unless another process has written one meanwhile."""
    file, name = tempfile.mkstemp(prefix=f"{NAME}-", dir=folder)
    try:
        try:
            os.fchmod(file, 0o600)
            os.write(file, secrets.token_urlsafe(BYTES).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)
        with suppress(FileExistsError):
            os.link(name, folder / NAME)
    finally:
        Path(name).unlink()
    durable.sync(folder)


def _unusable(path: Path, fault: str, remedy: str) -> str:
    return f"The password file {path} {fault}. Remedy: {remedy}."
