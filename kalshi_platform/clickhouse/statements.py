"""Cutting a SQL text into its statements. It knows quotes and comments, and nothing else of SQL."""

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
    """Each statement of `sql`, without its semicolon and without what only comments.

    A semicolon inside a string, an identifier, a heredoc or a comment ends nothing. Data after
    `INSERT … FORMAT` is not understood: give that as a statement of its own.
    Raises `StoreRefused` naming the line of a quote or comment that is never closed.
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
