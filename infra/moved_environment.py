"""Give the programs of a virtual environment its own interpreter: `python moved_environment.py .venv`.

Each program begins with the path of the interpreter that it was installed for. In an environment that was moved
or copied with its folder that is another one, or none. Run it by the environment's own interpreter; where it was
made, nothing changes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LONGEST = 127
"""Bytes of a first line that every kernel reads."""
_HEAD = re.compile(
    rb"#!/bin/sh\n'''exec' [^\n]*/bin/python[0-9.]*\"? \"\$0\" \"\$@\"\n' '''\n"
    rb"|#![^\n]*/bin/python[0-9.]*\n"
)
"""How pip begins a program: with the path, or by the shell where that is long or has a blank."""


def head(interpreter: Path) -> bytes:
    """The beginning of a program of this interpreter."""
    path = str(interpreter)
    if len(path.encode()) + 3 <= LONGEST and not re.search(r"\s", path):
        return f"#!{path}\n".encode()
    return f"#!/bin/sh\n'''exec' \"{path}\" \"$0\" \"$@\"\n' '''\n".encode()


def fit(environment: Path) -> int:
    """Rewrite the programs of other interpreters; returns how many there were."""
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
        fresh = path.with_name(f".{path.name}.new")  # not in place: a copy may share its bytes
        fresh.write_bytes(right + content[found.end() :])
        fresh.chmod(path.stat().st_mode)
        fresh.replace(path)
        changed += 1
    return changed


if __name__ == "__main__":
    fit(Path(sys.argv[1]))
