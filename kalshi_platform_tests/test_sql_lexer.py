"""The lexer covers each text from begin to end, as text and as bytes alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform import sql_lexer
from kalshi_platform.sql_lexer import Token, TooManyHeredocs

PIECES = [
    "'",
    '"',
    "`",
    "\\",
    "$",
    "$a$",
    "--",
    "#",
    "# ",
    "/*",
    "*/",
    "\n",
    " ",
    "x",
    "1.5",
    "(",
    "]",
    ";",
]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_text_and_bytes_have_the_same_tokens_in_order(sql: str) -> None:
    found = list(sql_lexer.tokens(sql))
    assert found == list(sql_lexer.tokens(sql.encode()))
    at = 0
    for token in found:
        assert sql[at : token.begin].isspace() or at == token.begin
        at = token.end
    assert sql[at:].isspace() or at == len(sql)


@pytest.mark.parametrize(
    ("sql", "kinds"),
    [
        ("a 'b' `c` 1.5", ["word", "string", "quoted", "number"]),
        ("$x$ ' $x$ -- c\n# d\n/* e */", ["heredoc", "comment", "comment", "comment"]),
        ("a 'b", ["word", "open"]),
        ("/* a", ["open"]),
        ("\ufeffa\u00a0b", ["word", "word"]),
    ],
)
def test_each_kind_of_token(sql: str, kinds: list[str]) -> None:
    assert [token.kind for token in sql_lexer.tokens(sql)] == kinds
    assert [token.kind for token in sql_lexer.tokens(sql.encode())] == kinds


def test_a_bracket_has_the_depth_outside_of_it() -> None:
    assert list(sql_lexer.tokens("([a])")) == [
        Token("mark", 0, 1, 0),
        Token("mark", 1, 2, 1),
        Token("word", 2, 3, 2),
        Token("mark", 3, 4, 1),
        Token("mark", 4, 5, 0),
    ]


def test_a_search_for_ends_that_clickhouse_could_not_interrupt_is_refused() -> None:
    with pytest.raises(TooManyHeredocs, match="too many heredocs"):
        list(sql_lexer.tokens(" ".join(f"$a{n}$" for n in range(20_000))))
