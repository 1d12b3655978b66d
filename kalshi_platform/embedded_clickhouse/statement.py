"""The parsing of a request's SQL that HTTP needs; the engine's own parser does the rest.

It finds where an INSERT's data begins, which format the answer has, whether there is more than one statement, and
whether the text names a file of the host. It works on bytes, since any binary format may follow an INSERT's header.

Tokens are the same as the engine's lexer's. That one cannot be interrupted while it searches the ends of heredocs, so
a text with too many that have none is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from kalshi_platform import sql_lexer
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError

_QUOTE = ord("'")
_BEFORE_DATA = re.compile(rb"(?:[ \t\f]*;)?[ \t\f]*\r?\n?")

_READ_FIRST = {"SELECT", "WITH", "FROM", "("}
"""First words of statements whose answer can be streamed."""
_READ_ONLY = _READ_FIRST | {"SHOW", "DESCRIBE", "DESC", "EXPLAIN", "EXISTS"}
_ONLY_WHOLE = {"TOTALS", "EXTREMES", "OUTPUT_FORMAT_JSON_ARRAY_OF_ROWS"}
_HOST_FUNCTIONS = {"file", "python"}
_HOST_ENGINES = {"SQLITE", "FILESYSTEM", "PYTHON", "BACKUP"}


class _Token(NamedTuple):
    kind: str
    text: str
    """Words in upper case; other tokens as written."""
    begin: int
    end: int
    depth: int
    """Number of open brackets around the token."""


@dataclass(frozen=True)
class Statement:
    """One statement of a request."""

    verb: str
    """The first word, in upper case; empty for an empty text."""
    format: str | None
    """The format in the text: of the answer, or of an INSERT's data."""
    header_end: int | None
    """INSERT with data: the end of its target, before SETTINGS, FORMAT or VALUES."""
    data_begin: int | None
    """INSERT with data: the offset of the data."""
    settings: str = ""
    """INSERT with data: its SETTINGS clause."""
    temporary: bool = False
    """CREATE TEMPORARY TABLE and similar statements."""
    whole: bool = False
    """The answer has a part (totals, extremes, brackets) that is missing when it is streamed."""
    inserts: bool = False
    """An INSERT, also one that starts with WITH."""

    @property
    def inserts_data(self) -> bool:
        """Whether data follows the statement, in the text or in the body."""
        return self.data_begin is not None

    @property
    def streams(self) -> bool:
        """Whether the engine can return the answer in pieces."""
        return self.verb in _READ_FIRST and not self.whole and not self.inserts

    @property
    def reads_only(self) -> bool:
        """Whether the statement changes nothing, according to its first word."""
        return self.verb in _READ_ONLY and not self.inserts

    @property
    def keeps_state(self) -> bool:
        """Whether the statement changes the session that it runs in."""
        return self.verb in {"SET", "USE"} or self.temporary


def parse(text: bytes) -> Statement:
    """Parse the statement at the start of `text`.

    Raises `ClickHouseError` for a second statement, and for access to files of the host that the engine's
    access rights do not cover.
    """
    tokens: list[_Token] = []
    for token in _tokens(text):
        if tokens and tokens[-1].text == ";" and token.text != ";":
            raise ClickHouseError(
                62,
                "SYNTAX_ERROR",
                f"Syntax error (Multi-statements are not allowed): failed at position {token.begin + 1}",
            )
        tokens.append(token)
        if tokens[0].text == "INSERT" and (insert := _insert(text, tokens)):
            return insert
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    if tokens and (len(tokens) == 1 or (tokens[0].kind != "word" and tokens[0].text != "(")):
        # for example `exit`, which the engine, a command-line tool, would obey silently
        shown = text.decode("utf-8", "replace").strip()[:80]
        raise ClickHouseError(62, "SYNTAX_ERROR", f"Syntax error: failed at position 1: {shown}")
    _refuse_host_access(text, tokens)
    inserts = any(t.text == "INSERT" and not t.depth for t in tokens)
    if inserts and any(t.text == "INPUT" and after.text == "(" for t, after in pairwise(tokens)):
        raise ClickHouseError(
            48,
            "NOT_IMPLEMENTED",
            "INSERT … SELECT … FROM input() is not supported by the embedded ClickHouse;"
            " insert the data into a table first",
        )
    verb = tokens[0].text if tokens else ""
    return Statement(
        verb=verb,
        format=_trailing_format(text, tokens),
        header_end=None,
        data_begin=None,
        temporary=verb in {"CREATE", "REPLACE", "DROP", "ATTACH"}
        and any(t.text == "TEMPORARY" for t in tokens[1:5]),
        whole=any(t.text in _ONLY_WHOLE for t in tokens),
        inserts=inserts,
    )


def _tokens(text: bytes) -> Iterator[_Token]:
    """The tokens of a text in order, without white space and comments."""
    try:
        for kind, begin, end, depth in sql_lexer.tokens(text):
            match kind:
                case "word":
                    said = text[begin:end].decode("ascii").upper()
                case "mark":
                    said = text[begin:end].decode("latin-1")
                case "comment":
                    continue
                case "open" if text[begin:end].startswith(b"/*"):
                    continue
                case _:
                    said = ""
            unclosed = "string" if text[begin] == _QUOTE else "quoted"
            yield _Token(unclosed if kind == "open" else kind, said, begin, end, depth)
    except sql_lexer.TooManyHeredocs as error:
        raise ClickHouseError(62, "SYNTAX_ERROR", f"Syntax error: {error}") from None


def _insert(text: bytes, tokens: list[_Token]) -> Statement | None:
    """The INSERT whose data begins right after the last token, if it does."""
    last = tokens[-1]
    if last.depth or len(tokens) < 3:
        return None
    named = tokens[-3].text in {"INTO", "TABLE", "."}  # a table may be called format, or values
    if tokens[-2].text == "FORMAT" and last.kind == "word" and not named:
        data_format = text[last.begin : last.end].decode()
        header_end, data_begin = tokens[-2].begin, _after_format(text, last.end)
    elif last.text == "VALUES" and tokens[-2].text not in {"INTO", "TABLE", ".", "FORMAT"}:
        data_format, header_end, data_begin = "Values", last.begin, last.end
    else:
        return None
    if any(t.text in {"SELECT", "WITH", "WATCH"} and not t.depth for t in tokens[2:]):
        return None  # FORMAT is the answer's, or part of the SELECT
    _refuse_host_access(text, tokens)
    target_end = next(
        (
            t.begin
            for before, t in pairwise(tokens[2:-1])
            if t.text == "SETTINGS" and not t.depth and before.text not in {"INTO", "TABLE", "."}
        ),
        header_end,
    )
    return Statement(
        *(
            "INSERT",
            data_format,
            target_end,
            data_begin,
            text[target_end:header_end].decode(errors="replace"),
        ),
        inserts=True,
    )


def _after_format(text: bytes, position: int) -> int:
    """The start of the data after `FORMAT x`: after blanks and one line end, or after a semicolon."""
    match = _BEFORE_DATA.match(text, position)
    return match.end() if match else position


def _trailing_format(text: bytes, tokens: list[_Token]) -> str | None:
    """The format at the end of a statement, or None."""
    for index in range(len(tokens) - 2, 0, -1):
        token, following = tokens[index], tokens[index + 1]
        if token.text != "FORMAT" or token.depth or following.kind != "word":
            continue
        after = tokens[index + 2].text if index + 2 < len(tokens) else "SETTINGS"
        if after in {"SETTINGS", "INTO"}:
            return text[following.begin : following.end].decode()
    return None


def _refuse_host_access(text: bytes, tokens: list[_Token]) -> None:
    """Refuse access to files of the host, which the engine supports as a command-line tool.

    Access rights (rights.py) and, on Linux, the kernel (confinement.py) prevent it, too; this check answers with a
    sentence that names the thing.
    """
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        before = tokens[index - 1].text if index else ""
        named = text[token.begin : token.end].decode("utf-8", "replace").strip('`"').lower()
        if token.text in {"OUTFILE", "INFILE"} and following and following.kind == "string":
            _refuse(f"{before} {token.text}")
        called = before == "APPLY" or (following is not None and following.text == "(")
        if token.kind in {"word", "quoted"} and named in _HOST_FUNCTIONS and called:
            _refuse(f"{named}()")
        if token.text in _HOST_ENGINES and before == "=" and tokens[index - 2].text == "ENGINE":
            _refuse(f"ENGINE = {token.text}")


def _refuse(thing: str) -> None:
    raise ClickHouseError(
        497,
        "ACCESS_DENIED",
        f"{thing} is not available: the embedded ClickHouse does not touch files of the host."
        " Send data in the request, read results from the answer.",
    )
