"""Splitting of a SQL text into statements. It understands quotes and comments, and nothing else of SQL."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kalshi_platform.errors import StoreRefused

_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n]*+ | \#[!\ ][^\n]*+ | /\*.*?\*/ )
    | (?P<text> '(?:[^'\\]|\\.|'')*+' | "(?:[^"\\]|\\.|"")*+" | `(?:[^`\\]|\\.|``)*+`
              | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$ )
    | (?P<open> ['"`] | /\* )
    | (?P<end> ; )
    | (?P<space> \s++ )
    | (?P<other> [^-\#/'"`$;\s]++ | . )
    """,
    re.VERBOSE | re.DOTALL,
)


def statements(sql: str) -> Iterator[str]:
    """Each statement of `sql`, without its semicolon; parts that hold only comments are left out.

    A semicolon inside a string, an identifier, a heredoc or a comment does not end a statement. Inline data after
    `INSERT … FORMAT` is not understood: pass such an insert as a text of its own.
    Raises `StoreRefused` with the line of a quote or comment that is never closed.
    """
    start: int | None = None
    for token in _TOKEN.finditer(sql):
        match token.lastgroup:
            case "comment" | "space":
                continue
            case "open":
                line = sql.count("\n", 0, token.start()) + 1
                raise StoreRefused(f"SQL: {token[0]} in line {line} is never closed. Close it.")
            case "end":
                if start is not None:
                    yield sql[start : token.start()].rstrip()
                start = None
            case _:
                start = token.start() if start is None else start
    if start is not None:
        yield sql[start:].rstrip()
