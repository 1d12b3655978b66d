"""The tokens of a SQL text, as ClickHouse's own lexer finds them.

In linear time: no byte is read more than twice. ClickHouse's lexer is not linear for heredocs that are not closed, so
the number of bytes that it would search is bounded here, and a text that exceeds it is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

LONGEST_SEARCH = 8 * 1024 * 1024
"""Bytes, or characters, that ClickHouse may search for the ends of heredocs: about 0.2 seconds."""

_GRAMMAR = r"""
    (?P<space> \s++ | <blank> )
  | (?P<comment> --[^\n]*+ | \#(?=[\ !])[^\n]*+ | /\*.*?\*/ )
  | (?P<string> '(?:[^'\\]++|\\.|'')*+' )
  | (?P<quoted> `(?:[^`\\]++|\\.|``)*+` | "(?:[^"\\]++|\\.|"")*+" )
  | (?P<open> (?:['"`]|/\*).*+ )
  | (?P<number> \d[\w.]*+ )
  | (?P<word> [A-Za-z_$][\w$]*+ )
  | (?P<mark> . )
"""
_FLAGS = re.VERBOSE | re.DOTALL
_OF_BYTES = re.compile(_GRAMMAR.replace("<blank>", r"\xef\xbb\xbf | \xc2\xa0").encode(), _FLAGS)
_OF_TEXT = re.compile(_GRAMMAR.replace("<blank>", "\ufeff | \u00a0"), _FLAGS | re.ASCII)
_TAG_OF_BYTES = re.compile(rb"\$\w*+(?=\$)")
_TAG_OF_TEXT = re.compile(r"\$\w*+(?=\$)", re.ASCII)


class TooManyHeredocs(ValueError):
    """The text has more heredocs without an end than ClickHouse is allowed to search for."""


class Token(NamedTuple):
    """A place in the text."""

    kind: str
    """comment, string, quoted (a name), open (one of these without its end), heredoc, number, word or mark."""
    begin: int
    end: int
    depth: int
    """How many brackets are open around it; a bracket itself has the depth outside of it."""


def tokens(text: str | bytes) -> Iterator[Token]:
    """The tokens of a text in order, white space left out. A text or a name that is not closed extends to the end.

    Raises `TooManyHeredocs`.
    """
    pattern: re.Pattern[Any] = _OF_TEXT if isinstance(text, str) else _OF_BYTES
    heredocs = _Heredocs(text)
    depth = begin = 0
    while begin < len(text):
        if closed := heredocs.end(begin):
            yield Token("heredoc", begin, closed, depth)
            begin = closed
            continue
        match = pattern.match(text, begin)
        if match is None:
            raise AssertionError("a token can be any character")
        kind, end = str(match.lastgroup), match.end()
        if kind == "mark":
            mark = match[0]
            depth -= mark in _CLOSING
            yield Token(kind, begin, end, depth)
            depth += mark in _OPENING
        elif kind != "space":
            yield Token(kind, begin, end, depth)
        begin = end


_OPENING = frozenset({"(", "[", b"(", b"["})
_CLOSING = frozenset({")", "]", b")", b"]"})


class _Heredocs:
    """Finds the ends of a text's heredocs; the positions of each tag are searched once."""

    def __init__(self, text: str | bytes) -> None:
        self._text = text
        self._tag: re.Pattern[Any] = _TAG_OF_TEXT if isinstance(text, str) else _TAG_OF_BYTES
        self._dollar = "$" if isinstance(text, str) else ord("$")
        self._searched = 0
        self._places: dict[Any, list[int]] | None = None

    def end(self, begin: int) -> int | None:
        """The end of the heredoc that begins here; None where none does. Raises `TooManyHeredocs`."""
        if self._text[begin] != self._dollar:
            return None
        tag = self._tag.match(self._text, begin)
        if tag is None:
            return None
        size = tag.end() + 1 - begin  # with the dollar behind it
        places = self._tags()[tag.group()]
        following = bisect_left(places, begin + size)
        if following < len(places):
            return places[following] + size
        self._searched += len(self._text) - begin
        if self._searched > LONGEST_SEARCH:
            raise TooManyHeredocs("the text has too many heredocs that are not closed")
        return None

    def _tags(self) -> dict[Any, list[int]]:
        if self._places is None:
            self._places = {}
            for match in self._tag.finditer(self._text):
                self._places.setdefault(match.group(), []).append(match.start())
        return self._places
