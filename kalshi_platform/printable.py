"""Text from elsewhere is never markup: what would command a terminal, forge a line of a log or be formatting
in Markdown is shown, not obeyed."""

from __future__ import annotations

import re
import unicodedata

_COMMANDING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters (an escape sequence begins with one), line ends, changes of direction, surrogates."""


def printable(text: str) -> str:
    """`text` on one line, with what would command a terminal or forge a line of a log spelt out."""
    return _COMMANDING.sub(_spelt, text)


def printable_block(text: str) -> str:
    """The same, but line ends and tabs stay: for what was laid out in lines."""
    return _COMMANDING.sub(lambda found: found[0] if found[0] in "\n\t" else _spelt(found), text)


def _spelt(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


_ACTIVE = re.compile(
    r"[\\`*\[\]<>|~$&]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[#+-]|(?<=^[0-9])[.)]|(?<=^[0-9]{2})[.)]"
)
"""What Markdown takes for formatting; a list's or a heading's sign only where a line begins."""
_ESCAPED = re.compile(r"\\([\\`*\[\]<>|~$&_#+\-.)])")


def markdown(text: str) -> str:
    """`text` as Markdown that shows just that, on one line."""
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", printable(text).strip())


def from_markdown(text: str) -> str:
    """What `markdown` was given, for those who show plain text."""
    return _ESCAPED.sub(r"\1", text)


def printable_lines(text: str) -> str:
    """The same line by line; all but the first are indented, so that none passes for a line of ours."""
    return "\n  ".join(printable(line) for line in text.splitlines())


def strip_invisible(text: str) -> str:
    """`text` without blanks, line ends and invisible characters at its ends, as pasting leaves them."""
    begin, end = 0, len(text)
    while begin < end and _is_invisible(text[begin]):
        begin += 1
    while begin < end and _is_invisible(text[end - 1]):
        end -= 1
    return text[begin:end]


def invisible_in(text: str) -> str | None:
    """The first control or format character of `text`, spelt out with its place; None where there is none."""
    for at, character in enumerate(text, 1):
        if unicodedata.category(character) in _INVISIBLE_CATEGORIES:
            return f"{character.encode('unicode_escape').decode()} (character {at})"
    return None


_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode general categories of what no editor shows: control, format, surrogates, unassigned, separators."""


def _is_invisible(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in _INVISIBLE_CATEGORIES
