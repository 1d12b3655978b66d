"""A temporary Postgres: Debian's binaries with a new cluster on a free port of the loopback interface."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from kalshi_platform_tests.ports import free_ports

USER, PASSWORD, DATABASE = "dagster", "only-for-this-test", "dagster"


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    on_path = shutil.which("initdb")
    places = [*found, *([Path(on_path).resolve()] if on_path else [])]
    return places[0].parent if places else None


def why_not() -> str | None:
    """Why Postgres cannot be started here, as a sentence; None if it can."""
    if binaries() is None:
        return "no Postgres is installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and _other_user() is None:
        return "initdb refuses root, and there is no user `postgres` to run it as"
    return None


@contextmanager
def running() -> Iterator[int]:
    """Context manager: start a Postgres; yields its port."""
    places = binaries()
    assert places is not None
    folder = Path(mkdtemp(prefix="kalshi-postgres-"))  # pytest's own folders are root's alone
    as_user = _other_user() if os.geteuid() == 0 else None
    try:
        (folder / "password").write_text(PASSWORD, encoding="utf-8")
        if as_user is not None:
            for path in (folder, folder / "password"):
                os.chown(path, as_user.pw_uid, as_user.pw_gid)
        [port] = free_ports(1)
        _run(
            as_user,
            *(places / "initdb", "--pgdata", folder / "data", "--username", USER, "--no-sync"),
            *("--auth", "scram-sha-256", "--pwfile", folder / "password", "--encoding", "UTF8"),
        )
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        control = (places / "pg_ctl", "--pgdata", folder / "data", "--wait", "--silent")
        _run(as_user, *control, "--log", folder / "log", "--options", options, "start")
        try:
            create = (places / "createdb", "--host", "127.0.0.1", "--port", str(port))
            _run(as_user, *create, "--username", USER, DATABASE)
            yield port
        finally:
            _run(as_user, *control, "--mode", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _other_user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def _run(as_user: pwd.struct_passwd | None, *command: object) -> None:
    ids = {} if as_user is None else {"user": as_user.pw_uid, "group": as_user.pw_gid}
    done = subprocess.run(
        [str(part) for part in command],
        env={"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "LC_ALL": "C.UTF-8"},
        cwd="/",
        stdout=subprocess.DEVNULL,  # the server inherits it: a pipe would never end
        stderr=subprocess.PIPE if "start" not in command else None,
        text=True,
        check=False,
        **ids,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stderr
