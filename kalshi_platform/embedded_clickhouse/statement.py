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
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError, as_bytes, as_text

_QUOTE = ord("'")
_BEFORE_DATA = re.compile(rb"(?:[ \t\f]*;)?[ \t\f]*\r?\n?")

_READ_FIRST = {"SELECT", "WITH", "FROM", "("}
"""First words of statements whose answer can be streamed."""
_READ_ONLY = _READ_FIRST | {"SHOW", "DESCRIBE", "DESC", "EXPLAIN", "EXISTS"}
_ONLY_WHOLE = {"TOTALS", "EXTREMES", "OUTPUT_FORMAT_JSON_ARRAY_OF_ROWS"}
_ERRORS_IN_FORMAT = "HTTP_WRITE_EXCEPTION_IN_OUTPUT_FORMAT"
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
    format_span: tuple[int, int] | None = None
    """The bytes of the answer's FORMAT clause, if there is one."""
    formats_errors: bool = False
    """Its SETTINGS ask for errors in the answer's format."""
    end: int = 0
    """The end of the last token before the closing semicolon."""

    @property
    def inserts_data(self) -> bool:
        """Whether data follows the statement, in the text or in the body."""
        return self.data_begin is not None

    @property
    def selects(self) -> bool:
        """Whether this is a SELECT, also one that starts with WITH or FROM."""
        return self.verb in _READ_FIRST and not self.inserts

    @property
    def streams(self) -> bool:
        """Whether the engine can return the answer in pieces."""
        return self.selects and not self.whole

    @property
    def reads_only(self) -> bool:
        """Whether the statement changes nothing, according to its first word."""
        return self.verb in _READ_ONLY and not self.inserts

    @property
    def keeps_state(self) -> bool:
        """Whether the statement changes the session that it runs in."""
        return self.verb in {"SET", "USE"} or self.temporary

    def without_format(self, sql: str) -> str:
        """The statement's text without FORMAT clause and semicolon."""
        text = as_bytes(sql)[: self.end]
        begin, end = self.format_span or (self.end, self.end)
        return as_text(text[:begin] + text[end:])

    def with_format(self, sql: str, name: str) -> str:
        """The statement's text with another format in its FORMAT clause, if it has one."""
        if self.format_span is None:
            return sql
        text = as_bytes(sql)
        begin, end = self.format_span
        return as_text(text[:begin] + f"FORMAT {name}".encode() + text[end:])


def parse(text: bytes) -> Statement:
    """Parse the statement at the start of `text`.

    Raises `ClickHouseError` for a second statement, and for access to files of the host that the engine's
    access rights do not cover.
    """
    tokens: list[_Token] = []
    into: int | None = None
    """Where an INSERT's INSERT or INTO is among the tokens."""
    for token in _tokens(text):
        if tokens and tokens[-1].text == ";" and token.text != ";":
            raise ClickHouseError(
                62,
                "SYNTAX_ERROR",
                f"Syntax error (Multi-statements are not allowed): failed at position {token.begin + 1}",
            )
        tokens.append(token)
        if into is None and _begins_insert(tokens):
            into = len(tokens) - 1
        if into is not None and (insert := _insert(text, tokens, into)):
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
    clause = _trailing_format(tokens)
    return Statement(
        verb=verb,
        format=text[clause[1].begin : clause[1].end].decode() if clause else None,
        header_end=None,
        data_begin=None,
        temporary=verb in {"CREATE", "REPLACE", "DROP", "ATTACH"}
        and any(t.text == "TEMPORARY" for t in tokens[1:5]),
        whole=any(t.text in _ONLY_WHOLE for t in tokens),
        inserts=inserts,
        format_span=(clause[0].begin, clause[1].end) if clause else None,
        formats_errors=any(
            setting.text == _ERRORS_IN_FORMAT
            and equals.text == "="
            # a closing ; was dropped, so a value follows
            and text[value.begin : value.end].lower() in {b"1", b"true"}
            for setting, equals, value in zip(tokens, tokens[1:], tokens[2:], strict=False)
            if not setting.depth
        ),
        end=tokens[-1].end if tokens else 0,
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


def _begins_insert(tokens: list[_Token]) -> bool:
    """Whether the last token begins an INSERT, which may be behind WITH; there, a query may be called insert, too."""
    first, last = tokens[0], tokens[-1]
    if first.text == "INSERT":
        return len(tokens) == 1
    behind_with = first.text == "WITH" and last.text == "INTO" and not last.depth
    return behind_with and tokens[-2].text == "INSERT"


def _insert(text: bytes, tokens: list[_Token], into: int) -> Statement | None:
    """The INSERT that begins at token `into`, whose data begins right after the last token, if it does."""
    last = tokens[-1]
    if last.depth or len(tokens) - into < 3:
        return None
    named = tokens[-3].text in {"INTO", "TABLE", "."}  # a table may be called format, or values
    if tokens[-2].text == "FORMAT" and last.kind == "word" and not named:
        data_format = text[last.begin : last.end].decode()
        header_end, data_begin = tokens[-2].begin, _after_format(text, last.end)
    elif last.text == "VALUES" and tokens[-2].text not in {"INTO", "TABLE", ".", "FORMAT"}:
        data_format, header_end, data_begin = "Values", last.begin, last.end
    else:
        return None
    if any(t.text in {"SELECT", "WITH", "WATCH"} and not t.depth for t in tokens[into + 2 :]):
        return None  # FORMAT is the answer's, or part of the SELECT
    _refuse_host_access(text, tokens)
    target_end = next(
        (
            t.begin
            for before, t in pairwise(tokens[into + 2 : -1])
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
            as_text(text[target_end:header_end]),
        ),
        inserts=True,
    )


def _after_format(text: bytes, position: int) -> int:
    """The start of the data after `FORMAT x`: after blanks and one line end, or after a semicolon."""
    match = _BEFORE_DATA.match(text, position)
    return match.end() if match else position


def _trailing_format(tokens: list[_Token]) -> tuple[_Token, _Token] | None:
    """FORMAT and the format's name at the end of a statement, or None."""
    for index in range(len(tokens) - 2, 0, -1):
        token, following = tokens[index], tokens[index + 1]
        if token.text != "FORMAT" or token.depth or following.kind != "word":
            continue
        after = tokens[index + 2].text if index + 2 < len(tokens) else "SETTINGS"
        if after in {"SETTINGS", "INTO"}:
            return token, following
    return None


def split_at_commas(text: str) -> list[str]:
    """The parts of a list that is separated by commas outside of brackets and quotes."""
    encoded = text.encode()
    ends = [t.begin for t in _tokens(encoded) if t.text == "," and not t.depth]
    begins = [0, *(end + 1 for end in ends)]
    return [
        encoded[begin:end].decode().strip()
        for begin, end in zip(begins, [*ends, len(encoded)], strict=True)
    ]


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
