"""Splitting of a SQL text into statements."""

from __future__ import annotations

from collections.abc import Iterator

from kalshi_platform import sql_lexer
from kalshi_platform.errors import StoreRefused


def statements(sql: str) -> Iterator[str]:
    """Each statement of `sql`, without its semicolon; parts that hold only comments are left out.

    A semicolon inside a string, an identifier, a heredoc or a comment does not end a statement. Inline data after
    `INSERT … FORMAT` is not understood: pass such an insert as a text of its own.
    Raises `StoreRefused` with the line of a quote or comment that is never closed.
    """
    start: int | None = None
    try:
        for kind, begin, end, _ in sql_lexer.tokens(sql):
            if kind == "open":
                line = sql.count("\n", 0, begin) + 1
                mark = "/*" if sql.startswith("/*", begin) else sql[begin]
                raise StoreRefused(f"SQL: {mark} in line {line} is never closed. Close it.")
            if sql[begin:end] == ";":
                if start is not None:
                    yield sql[start:begin].rstrip()
                start = None
            elif kind != "comment" and start is None:
                start = begin
    except sql_lexer.TooManyHeredocs as error:
        raise StoreRefused(f"SQL: {error}. Close them.") from None
    if start is not None:
        yield sql[start:].rstrip()
