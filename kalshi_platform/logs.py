"""Log formats and logging configuration: text for people, or JSON, one object a line (LOG_FORMAT=json).

The JSON keys are `ts` (RFC 3339, UTC), `level`, `logger`, `message`; `shard`, `run_id`, `job` and `step`
if known; `exception` with its traceback. Modules log with `logging.getLogger(__name__)` as usual.
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
"""Fields of every JSON line of this process, such as its shard and run."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as a line, without the line end."""
        dagster_meta = getattr(record, "dagster_meta", None) or {}
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": dagster_meta.get("orig_message") or record.getMessage(),
            **_bound,
        }
        for key, name in (("run_id", "run_id"), ("job_name", "job"), ("step_key", "step")):
            if dagster_meta.get(key):
                line[name] = dagster_meta[key]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(
            line, default=str
        )  # ASCII only, so no control sequence reaches a terminal


class TextFormatter(logging.Formatter):
    """Text for people. Foreign text can neither control the terminal nor forge a log line."""

    def __init__(self, text: str = TEXT) -> None:
        super().__init__(text)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Format the message line with control characters escaped."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """Format a traceback, with control characters escaped line by line."""
        return printable_lines(super().formatException(ei))


def formatter(settings: Settings) -> logging.Formatter:
    """The formatter that LOG_FORMAT selects."""
    return JsonFormatter() if settings.log_format == "json" else TextFormatter()


def configure(settings: Settings, name: str = "", stream: TextIO | None = None) -> None:
    """Make a logger (by default the root) write to stderr in the format of the settings.

    LOG_LEVEL applies to the platform's own loggers; libraries log from WARNING on, since below it some log
    addresses and headers that are secret. A second call replaces the handler of the first. With
    LOG_FORMAT=json an uncaught exception is logged as a JSON line, too.
    """
    logger = logging.getLogger(name)
    for former in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(former)
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(formatter(settings))
    logger.addHandler(handler)
    logging.getLogger(PLATFORM).setLevel(settings.log_level)
    if settings.log_format == "json" and not name:
        sys.excepthook = _log_uncaught


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Context manager: add these fields to every JSON line of this process."""
    before = dict(_bound)
    _bound.update(fields)
    try:
        yield
    finally:
        _bound.clear()
        _bound.update(before)


class _Handler(logging.StreamHandler[TextIO]):
    """The platform's handler; a class of its own so that `configure` finds it among others."""


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logging.getLogger(PLATFORM).critical("%s", error, exc_info=(kind, error, traceback))
