"""A parser for the CREATE, ALTER and DROP statements of the migrations.

It understands the forms that the migrations use, and nothing else of SQL.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kalshi_platform import sql_lexer

__all__ = ["Definition", "Token", "after_if", "altered", "definition", "dropped", "tokens_of"]


class Token(NamedTuple):
    """A word, a quoted text or a punctuation mark of a statement."""

    text: str
    start: int
    end: int
    depth: int
    """How many brackets are open around it; a bracket itself has the depth outside of it."""

    def says(self, *words: str) -> bool:
        """Whether the token is one of these keywords."""
        return self.text.upper() in words


@dataclass(frozen=True)
class Definition:
    """A table or a view that a statement creates."""

    name: str
    is_view: bool
    columns: tuple[str, ...]
    """The columns of a table; empty for a view."""
    comment: str
    """The table's comment, or empty."""


def tokens_of(sql: str) -> list[Token]:
    """The tokens of a statement, without comments and white space."""
    return [
        Token(sql[begin:end], begin, end, depth)
        for kind, begin, end, depth in sql_lexer.tokens(sql)
        if kind != "comment"
    ]


def after_if(found: Sequence[Token], at: int, words: tuple[str, ...]) -> int:
    """The index after `words` if they are the tokens at `at`, else `at`."""
    present = tuple(token.text.upper() for token in found[at : at + len(words)])
    return at + len(words) if present == words else at


def definition(statement: str) -> Definition | None:
    """The table or view that `statement` creates, or None."""
    found = tokens_of(statement)
    match [token.text.upper() for token in found[:4]]:
        case ["CREATE", "TABLE", *_]:
            at = after_if(found, 2, ("IF", "NOT", "EXISTS"))
            return Definition(
                found[at].text, is_view=False, columns=_columns(found), comment=_comment(found)
            )
        case ["CREATE", "OR", "REPLACE", "VIEW"]:
            at = 4
        case ["CREATE", "VIEW", *_]:
            at = 2
        case ["CREATE", "MATERIALIZED", "VIEW", *_]:
            at = 3
        case _:
            return None
    at = after_if(found, at, ("IF", "NOT", "EXISTS"))
    return Definition(found[at].text, is_view=True, columns=(), comment=_comment(found))


def dropped(statement: str) -> str | None:
    """The name of the table or view that `statement` drops, or None."""
    found = tokens_of(statement)
    match [token.text.upper() for token in found[:2]]:
        case ["DROP", "TABLE" | "VIEW"]:
            return found[after_if(found, 2, ("IF", "EXISTS"))].text
    return None


def altered(statement: str) -> str | None:
    """The name of the table that `statement` alters, or None."""
    found = tokens_of(statement)
    match [token.text.upper() for token in found[:2]]:
        case ["ALTER", "TABLE"]:
            return found[2].text
    return None


def _columns(found: Sequence[Token]) -> tuple[str, ...]:
    """The first word after the parenthesis that opens the columns, and after each comma in it."""
    begin = next(i for i, token in enumerate(found) if token.text == "(" and not token.depth)
    end = next(
        i for i, token in enumerate(found) if i > begin and token.text == ")" and not token.depth
    )
    return tuple(
        token.text
        for before, token in itertools.pairwise(found[begin:end])
        if (before.text == "(" and not before.depth) or (before.text == "," and before.depth == 1)
    )


def _comment(found: Sequence[Token]) -> str:
    """The text after a COMMENT outside of all parentheses."""
    for before, token in itertools.pairwise(found):
        if before.says("COMMENT") and not before.depth:
            return token.text[1:-1].replace("''", "'")
    return ""
