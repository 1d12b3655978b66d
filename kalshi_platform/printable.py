"""Text from elsewhere, for a terminal or a log: a control character in it is shown, not obeyed."""

from __future__ import annotations

import re

_COMMANDING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (an escape sequence begins with one), line ends, changes of direction, surrogates."""


def printable(text: str) -> str:
    """`text` on one line, with what would command a terminal or forge a line of a log spelt out."""
    return _COMMANDING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
