"""Escaping of untrusted text for terminals, logs and Markdown.

Control characters that would drive a terminal or forge a log line, and characters that Markdown would
interpret, are shown instead of obeyed.
"""

from __future__ import annotations

import re
import unicodedata

_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters (an escape sequence begins with one), line ends, bidirectional controls, surrogates."""


def printable(text: str) -> str:
    """`text` on one line, with control characters and line ends as escape sequences."""
    return _CONTROL.sub(_escape, text)


def printable_block(text: str) -> str:
    """Like `printable`, but keeps line ends and tabs: for text that is laid out in lines."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found), text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


_ACTIVE = re.compile(
    r"[\\`*\[\]<>|~$&]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[#+-]|(?<=^[0-9])[.)]|(?<=^[0-9]{2})[.)]"
)
"""Characters that Markdown interprets; list and heading markers only at the start of a line."""
_ESCAPED = re.compile(r"\\([\\`*\[\]<>|~$&_#+\-.)])")


def markdown(text: str) -> str:
    """Escape `text` so that Markdown shows it literally, on one line."""
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", printable(text).strip())


def from_markdown(text: str) -> str:
    """The inverse of `markdown`, for channels that show plain text."""
    return _ESCAPED.sub(r"\1", text)


def printable_lines(text: str) -> str:
    """`printable`, line by line; all lines but the first are indented, so that none looks like a log line."""
    return "\n  ".join(printable(line) for line in text.splitlines())


def strip_invisible(text: str) -> str:
    """Strip white space and invisible characters, which pasting leaves, from both ends of `text`."""
    begin, end = 0, len(text)
    while begin < end and _is_invisible(text[begin]):
        begin += 1
    while begin < end and _is_invisible(text[end - 1]):
        end -= 1
    return text[begin:end]


def invisible_in(text: str) -> str | None:
    """The first control or format character of `text`, escaped and with its position; None if it has none."""
    for at, character in enumerate(text, 1):
        if unicodedata.category(character) in _INVISIBLE_CATEGORIES:
            return f"{character.encode('unicode_escape').decode()} (character {at})"
    return None


_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode general categories of invisible characters: control, format, surrogate, unassigned, separator."""


def _is_invisible(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in _INVISIBLE_CATEGORIES
