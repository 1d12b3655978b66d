"""ClickHouse's HTTP answers: error texts, statuses of error codes, content types; the decoding of text in requests.

Codes and statuses are those of ClickHouse's HTTP handler (`exceptionCodeToHTTPStatus`).
"""

from __future__ import annotations

import re

_STATUS = {
    194: 401,
    **dict.fromkeys((192, 193, 497, 512, 516), 403),
    **dict.fromkeys(
        (6, 8, 15, 25, 26, 27, 36, 37, 38, 41, 44, 53, 62, 69, 72, 117, 123, 167, 168, 223), 400
    ),
    **dict.fromkeys((376, 427, 441, 675, 676), 400),
    **dict.fromkeys((46, 47, 50, 56, 60, 63, 73, 78, 81, 115, 152, 336, 511), 404),
    159: 408,
    381: 411,
    229: 413,
    48: 501,
    **dict.fromkeys((76, 209, 439), 503),
}

_CODE = re.compile(r"Code: (\d+)\. DB::Exception: ")
_TRAILER = re.compile(r"\s*\(version [\d.]+[^)]*\)\.?\s*")
_SOURCE = re.compile(r" ?\(in file/uri /dev/fd/\d+\):?")
"""The engine's name for the source of an INSERT's data, which the client sent in the request."""
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)\s*$")

_CONTENT_TYPES = (
    (re.compile(r"(TabSeparated|TSV)", re.I), "text/tab-separated-values; charset=UTF-8"),
    (re.compile(r"CSVWithNames", re.I), "text/csv; charset=UTF-8; header=present"),
    (re.compile(r"CSV", re.I), "text/csv; charset=UTF-8; header=absent"),
    (re.compile(r"JSON(Strings)?EachRow$", re.I), "application/x-ndjson; charset=UTF-8"),
    (re.compile(r"JSONCompact.*EachRow", re.I), "application/x-ndjson; charset=UTF-8"),
    (re.compile(r"JSON", re.I), "application/json; charset=UTF-8"),
    (re.compile(r"XML", re.I), "application/xml; charset=UTF-8"),
    (
        re.compile(r"(Pretty|Vertical|Values|Markdown|SQLInsert|LineAsString|Template|Null)", re.I),
        "text/plain; charset=UTF-8",
    ),
)


class ClickHouseError(Exception):
    """An error in ClickHouse's form: `code`, `name` and the sentence."""

    def __init__(self, code: int, name: str, sentence: str) -> None:
        super().__init__(f"Code: {code}. DB::Exception: {sentence} ({name})")
        self.code = code
        self.name = name
        self.sentence = sentence

    @classmethod
    def from_engine(cls, text: str) -> ClickHouseError:
        """Parse the engine's error text; nested texts of the same error are unwrapped."""
        text = _SOURCE.sub("", text)
        matches = list(_CODE.finditer(text))
        if not matches:
            return cls(1001, "STD_EXCEPTION", text.strip())
        sentence = _TRAILER.sub(" ", text[matches[-1].end() :]).strip()
        sentence = re.sub(r"(\([A-Z][A-Z0-9_]+\))(?:\.? \1)+$", r"\1", sentence)
        name = _NAME.search(sentence)
        code = int(matches[-1].group(1))
        if name is None:
            return cls(code, "UNKNOWN_EXCEPTION", sentence)
        return cls(code, name.group(1), sentence[: name.start()].strip())

    @property
    def status(self) -> int:
        """The HTTP status that ClickHouse uses for this code."""
        return _STATUS.get(self.code, 500)


def as_text(value: bytes) -> str:
    """Bytes of a request as text, without loss: a byte that is not UTF-8 is a lone surrogate."""
    return value.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The bytes of `as_text`, for the engine."""
    return text.encode("utf-8", "surrogateescape")


def decoded(value: bytes, label: str) -> str:
    """Decode text of a request that must be UTF-8: names, settings, and statements that define something.

    Raises `ClickHouseError` for other bytes, which are neither replaced nor passed on.
    """
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ClickHouseError(
            36,
            "BAD_ARGUMENTS",
            f"{label} is not UTF-8: {error.reason} at byte {error.start}. Other bytes may be in SELECT, INSERT, their"
            " parameters and data; elsewhere, write them as unhex('…')",
        ) from error


def content_type(output_format: str) -> str:
    """The Content-Type of an answer in this ClickHouse format."""
    for pattern, value in _CONTENT_TYPES:
        if pattern.match(output_format):
            return value
    return "application/octet-stream"
