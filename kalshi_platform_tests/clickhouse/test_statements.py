"""The statement splitter: a semicolon ends a statement only outside of quotes and comments."""

from __future__ import annotations

import pytest

from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.errors import StoreRefused


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("", []),
        ("  ;; -- nothing\n ; /* nor; here */", []),
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1; SELECT 2;", ["SELECT 1", "SELECT 2"]),
        ("SELECT ';' ; SELECT \"a;b\", `c;d`", ["SELECT ';'", 'SELECT "a;b", `c;d`']),
        (r"SELECT 'it\';s'; SELECT 'it'';s'", [r"SELECT 'it\';s'", "SELECT 'it'';s'"]),
        ("SELECT 'a\\\\'; SELECT 2", ["SELECT 'a\\\\'", "SELECT 2"]),
        ("SELECT 1 -- one; more\n+ 2; SELECT 3", ["SELECT 1 -- one; more\n+ 2", "SELECT 3"]),
        ("# a note; here\nSELECT 1;#! another;\nSELECT 2", ["SELECT 1", "SELECT 2"]),
        ("SELECT 1 /* ; 'open */; SELECT 2", ["SELECT 1 /* ; 'open */", "SELECT 2"]),
        ("-- it's a note\nSELECT 1 - 2 / 3;", ["SELECT 1 - 2 / 3"]),
        ("SELECT $x$ a; 'b $x$; SELECT $$;$$", ["SELECT $x$ a; 'b $x$", "SELECT $$;$$"]),
        ("SELECT {a:String}; SELECT [1]", ["SELECT {a:String}", "SELECT [1]"]),
    ],
)
def test_a_semicolon_in_quotes_or_comments_ends_nothing(sql: str, expected: list[str]) -> None:
    assert list(statements(sql)) == expected


@pytest.mark.parametrize(
    ("sql", "words"),
    [("SELECT 1;\nSELECT 'a", "'"), ("\nSELECT `a", "`"), ("SELECT 1\n/* a", r"/\*")],
)
def test_what_is_never_closed_is_named_with_its_line(sql: str, words: str) -> None:
    with pytest.raises(StoreRefused, match=rf"{words} in line 2 is never closed"):
        list(statements(sql))
