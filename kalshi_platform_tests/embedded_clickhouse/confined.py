"""A process that is confined like the embedded ClickHouse's, tries to escape, and prints what happened.

    python -m kalshi_platform_tests.embedded_clickhouse.confined FOLDER REACHED_PORT OTHER_PORT [PORT ...]

Prints one JSON object: what was tried, and the name of the error or "done". The last arguments are the
ports that the process may connect to.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kalshi_platform.embedded_clickhouse.confinement import confine


def main(folder: Path, reached: int, other: int, ports: list[int]) -> None:
    """Try each escape once."""
    early, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
    sleeper = threading.Thread(target=early.wait, daemon=True)
    sleeper.start()  # a thread from before: the filter is set for it, too
    confine(folder, ports)
    early.set()

    os.environ["TMPDIR"] = str(folder)  # loading the engine makes a temporary folder
    import chdb

    connect: Callable[[str], Any] = chdb.connect
    connection = connect(str(folder / "engine"))  # with every right that the engine has
    connection.query(
        "CREATE DICTIONARY program (k String, v String) PRIMARY KEY k"
        " SOURCE(EXECUTABLE(COMMAND 'true' FORMAT 'TSV')) LAYOUT(COMPLEX_KEY_HASHED()) LIFETIME(0)"
    )

    def sql(statement: str) -> Callable[[], Any]:
        return lambda: connection.query(statement)

    attempts: dict[str, Callable[[], Any]] = {
        "execve": lambda: os.execv("/bin/true", ["true"]),
        "subprocess": lambda: subprocess.run(["/bin/true"], check=True),
        "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "fork": os.fork,
        "signal another": lambda: os.kill(os.getppid(), 0),
        "read a file": lambda: Path("/etc/passwd").read_bytes(),
        "read the environment": lambda: Path("/proc/self/environ").read_bytes(),
        "write beside": lambda: (folder.parent / "beside").write_text("x"),
        "connect": lambda: socket.create_connection(("127.0.0.1", reached), timeout=5),
        "connect to another port": lambda: socket.create_connection(("127.0.0.1", other), 5),
        "a local socket": lambda: socket.socket(socket.AF_UNIX),
        "listen": lambda: socket.create_server(("127.0.0.1", 0)),
        "a thread": lambda: threading.Thread(target=int).start(),
        "signal itself": lambda: signal.raise_signal(signal.SIGCHLD),
        "keep listening": listener.listen,
        "a pair of sockets": socket.socketpair,
        "write and rename": lambda: _write(folder / "new").rename(folder / "old"),
        "SQL: read a file": sql("SELECT file('/etc/passwd')"),
        "SQL: a table of the internet": sql(
            f"SELECT * FROM url('http://127.0.0.1:{other}/', 'CSV', 'a String')"
            " SETTINGS http_max_tries = 1"
        ),
        "SQL: a program": sql("SELECT * FROM program"),
        "SQL": sql("SELECT 1"),
    }
    print(json.dumps({name: _outcome(attempt) for name, attempt in attempts.items()}))  # noqa: T201


def _write(path: Path) -> Path:
    path.write_text("x")
    return path


def _outcome(attempt: Callable[[], Any]) -> str:
    import chdb

    try:
        attempt()
    except (OSError, RuntimeError, chdb.ChdbError) as error:
        return type(error).__name__
    return "done"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(p) for p in sys.argv[4:]])
    sys.stdout.flush()
    os._exit(0)
