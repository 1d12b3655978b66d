"""An embedded engine whose user has exactly the rights of a role of infra/clickhouse_users.

The engine keeps users in a file only: CREATE ROLE and CREATE USER are not to be had. So a role's GRANT
statements, word for word, become the rights of its user `default`; the engine itself enforces them. What is
not shown: roles, profiles and users as objects, and passwords. A role's settings profile becomes the user's.

    python -m kalshi_platform_tests.infra.as_role FOLDER ROLE
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast
from xml.sax.saxutils import escape

import click

from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.embedded_clickhouse import engine, refused, rights
from kalshi_platform.embedded_clickhouse.server import serve

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "infra" / "clickhouse_users" / "roles.sql"


def grants(role: str) -> list[str]:
    """The GRANT statements of a role, including those of the roles that it inherits."""
    found: list[str] = []
    for statement in statements(ROLES.read_text(encoding="utf-8")):
        match = re.fullmatch(r"(GRANT .+) TO (\w+)", " ".join(statement.split()))
        if match is None or match[2] != role:
            continue
        inherited = re.fullmatch(r"GRANT (kalshi_\w+)", match[1])
        found += grants(inherited[1]) if inherited else [match[1]]
    return found


def profile(role: str) -> str:
    """The role's settings profile for users.xml: values, and their bounds."""
    for statement in statements(ROLES.read_text(encoding="utf-8")):
        match = re.fullmatch(
            r"CREATE SETTINGS PROFILE .* SETTINGS (.+) TO ([\w, ]+)", " ".join(statement.split())
        )
        if match is None or role not in match[2].split(", "):
            continue
        values, bounds = "", ""
        for assignment in match[1].split(", "):
            setting = re.fullmatch(
                r"(\w+) = (\S+)(?: (CONST)|(?: MIN (\d+) MAX (\d+)))?", assignment
            )
            assert setting is not None, assignment
            values += f"<{setting[1]}>{setting[2].strip(chr(39))}</{setting[1]}>"
            if setting[3]:
                bounds += f"<{setting[1]}><readonly/></{setting[1]}>"
            elif setting[4]:
                bounds += (
                    f"<{setting[1]}><min>{setting[4]}</min><max>{setting[5]}</max></{setting[1]}>"
                )
        return f"{values}<constraints>{bounds}</constraints>"
    raise AssertionError(f"{role} has no settings profile")


@contextmanager
def running(folder: Path, role: str) -> Iterator[str]:
    """Context manager: serve `folder` to a user with the rights of `role`; yields the URL."""
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder), role], stdout=subprocess.PIPE, text=True
    )
    try:
        yield cast(IO[str], child.stdout).readline().strip()
    finally:
        child.terminate()
        child.communicate(timeout=30)


def main(folder: Path, role: str) -> None:
    """Serve until a signal."""
    module: Any = rights
    own = "".join(f"<query>{escape(grant)}</query>" for grant in grants(role))
    users = re.sub(r"<grants>.*</grants>", f"<grants>{own}</grants>", rights.users(""))
    users = re.sub(r"<constraints>.*</constraints>", "", users)
    users = users.replace("</default></profiles>", f"{profile(role)}</default></profiles>")
    module.users = lambda _: users
    rewritten: Any = engine.Engine
    rewritten.permit = lambda *_, **__: None  # the rights alone are shown
    # it takes rights that no role has; the tests name their database in full
    rewritten._make_default_database_plain = lambda self, kept: None
    cast(Any, refused).set_aside = lambda *_: None
    serve(
        path=folder,
        port=0,
        user="default",
        password="",
        ready=lambda port: click.echo(f"http://127.0.0.1:{port}"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
