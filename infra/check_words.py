"""Words that the code and its pages do not use, with the field's own word for each: `make check` runs this.

    python infra/check_words.py [FILE ...]      without files: everything that git tracks

A line that must have such a word (a quotation, another program's term) ends with `words: ok`. A value of the
recording, in quotes, may stand anywhere: recorded rows keep it. So may a method, which is found where it is defined
(`file.tell()` is Python's).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    r"some(body|one)|no(body| one)|whoever|anybody": "the actor: the loader, the operator, a client",
    r"anew": "again",
    r"told|tells?|telling": "report, say, log, notify",
    r"believ\w+": "synced, trusted, known",
    r"doubt\w*|distrust\w*": "stale, uncertain",
    r"heed\w*": "apply, handle",
    r"befall\w*|befell": "happen",
    r"mend(s|ed|ing)?": "repair, fix",
    r"let go|lets go": "release, drop",
    r"undertaker|bury|buried|buries": "reaper, reap",
    r"roster": "universe, market selection",
    r"passage": "watermark",
    r"side channels?": "auxiliary channel",
    r"stretch(es)?": "range",
    r"torn tails?": "unfinished end",
}
RECORDED = re.compile(r"""(['"`])doubt\1""")
"""Values that recorded rows have: the cause of a row of `spreads`."""
SUFFIXES = {".py", ".md", ".sql", ".toml", ".yaml", ".yml", ".sh", ".c", ".example", ""}
EXEMPT = {"CHANGELOG.md", "LICENSE", "docs/glossary.md", "infra/check_words.py"}
_WORD = re.compile(rf"(?<![A-Za-z.])({'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)


def tracked() -> list[str]:
    """Every file of the project that people read."""
    listed = subprocess.run(
        ["git", "ls-files"],  # noqa: S607 - the git of the shell
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.splitlines() if is_read(name)]


def is_read(name: str) -> bool:
    """Whether a file is the project's own text."""
    data = (
        "upgrade/folders" in name
        or "clickhouse_migrations" in name
        or name.endswith((".lock", ".txt", ".json", ".png", ".gz"))
    )
    return not data and name not in EXEMPT and Path(name).suffix in SUFFIXES


def found(name: str) -> list[str]:
    """The lines of a file that have such a word, with what to write."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [
        f"{name}:{number}: “{match[0]}”: write {instead(match[0])}"
        for number, line in enumerate(lines, 1)
        if not line.rstrip().endswith("words: ok")
        for match in _WORD.finditer(RECORDED.sub("", line))
    ]


def instead(word: str) -> str:
    """The field's word for one."""
    return next(right for wrong, right in WORDS.items() if re.fullmatch(wrong, word, re.IGNORECASE))


def main() -> int:
    """Print what is found; 1 where anything is."""
    names = sys.argv[1:] or tracked()
    lines = [line for name in names for line in found(name)]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
