"""How the platform logs: text for people, or JSON for machines, one object a line (LOG_FORMAT=json).

The keys: `ts` (RFC 3339, UTC), `level`, `logger`, `message`; `shard`, `run_id`, `job` and `step` where they
are known; `exception` with its traceback. Modules log by `logging.getLogger(__name__)`, as ever.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from kalshi_platform.printable import printable, printable_lines
from kalshi_platform.settings import Settings

PLATFORM = "kalshi_platform"
TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_bound: dict[str, Any] = {}
"""What is known of this process, which records one shard in one run."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, without its end."""
        of_dagster = getattr(record, "dagster_meta", None) or {}
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": of_dagster.get("orig_message") or record.getMessage(),
            **_bound,
        }
        for key, name in (("run_id", "run_id"), ("job_name", "job"), ("step_key", "step")):
            if of_dagster.get(key):
                line[name] = of_dagster[key]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: nothing in it commands a terminal


class TextFormatter(logging.Formatter):
    """For people. What others wrote neither commands the terminal nor passes for a line of ours."""

    def __init__(self, text: str = TEXT) -> None:
        super().__init__(text)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The record's line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """A traceback, line by line."""
        return printable_lines(super().formatException(ei))


def formatter(settings: Settings) -> logging.Formatter:
    """As LOG_FORMAT has it."""
    return JsonFormatter() if settings.log_format == "json" else TextFormatter()


def configure(settings: Settings, name: str = "", stream: TextIO | None = None) -> None:
    """Let a logger (the root, where none is named) write to stderr as the settings say.

    LOG_LEVEL is the platform's own; libraries speak from WARNING on, since some of them would tell
    addresses and headers that are secrets. May be called again: the handler of the call before is
    replaced. In JSON an error that ends the program is a line like any other.
    """
    logger = logging.getLogger(name)
    for handler in [each for each in logger.handlers if isinstance(each, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(formatter(settings))
    logger.addHandler(handler)
    logging.getLogger(PLATFORM).setLevel(settings.log_level)
    if settings.log_format == "json" and not name:
        sys.excepthook = _log_uncaught


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """While it lasts, every JSON line of this process has these fields, too."""
    before = dict(_bound)
    _bound.update(fields)
    try:
        yield
    finally:
        _bound.clear()
        _bound.update(before)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, to be told from others'."""


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logging.getLogger(PLATFORM).critical("%s", error, exc_info=(kind, error, traceback))
