"""Repair the programs of a moved virtual environment: `python moved_environment.py .venv`.

Each program begins with the path of the interpreter for which it was installed. In an environment that was moved or
copied, that path leads to another interpreter, or to none. Run it with the environment's own interpreter; in an
environment that was not moved, nothing changes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LONGEST = 127
"""Longest first line in bytes that every kernel reads."""
_HEAD = re.compile(
    rb"#!/bin/sh\n'''exec' [^\n]*/bin/python[0-9.]*\"? \"\$0\" \"\$@\"\n' '''\n"
    rb"|#![^\n]*/bin/python[0-9.]*\n"
)
"""The beginning of a program that pip installs: the path, or a shell call if the path is long or has a blank."""


def head(interpreter: Path) -> bytes:
    """The first lines of a program for this interpreter."""
    path = str(interpreter)
    if len(path.encode()) + 3 <= LONGEST and not re.search(r"\s", path):
        return f"#!{path}\n".encode()
    return f"#!/bin/sh\n'''exec' \"{path}\" \"$0\" \"$@\"\n' '''\n".encode()


def fit(environment: Path) -> int:
    """Rewrite the programs that name another interpreter; returns their number."""
    folder = environment.absolute() / "bin"
    right, changed = head(folder / "python"), 0
    own = re.compile(re.escape(str(folder).encode()) + rb"/python[0-9.]*[\"\n]")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        found = _HEAD.match(content)
        if found is None or own.search(found[0]):
            continue
        fresh = path.with_name(
            f".{path.name}.new"
        )  # not in place, since a hard-linked copy may share the file
        fresh.write_bytes(right + content[found.end() :])
        fresh.chmod(path.stat().st_mode)
        fresh.replace(path)
        changed += 1
    return changed


if __name__ == "__main__":
    fit(Path(sys.argv[1]))
