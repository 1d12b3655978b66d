"""The log output of a run, in the format of LOG_FORMAT.

Dagster creates a logger for each run, and accepts another format only through each run's configuration. For
JSON the logger is therefore replaced in the module where Dagster looks it up.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster import _loggers

from kalshi_platform import logs
from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.settings import Settings


@dg.logger(config_schema=None, description="Dagster's events as JSON, one object a line.")
def json_console(init: dg.InitLoggerContext) -> logging.Logger:
    """A logger at LOG_LEVEL that is not in the logger tree, so that a run's events are logged once."""
    settings = platform_settings.load()
    made = logging.getLoggerClass()("dagster", level=settings.log_level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logs.JsonFormatter())
    made.addHandler(handler)
    return made


def configure() -> None:
    """Make Dagster's runs in this process log in LOG_FORMAT. Called when the definitions are loaded."""
    try:
        settings = platform_settings.load()
    except SettingsError:
        return  # the first run reports it
    if settings.log_format == "json":
        _loggers.colored_console_logger = json_console
        logs.configure(settings, logs.PLATFORM)


@contextmanager
def output_log(settings: Settings, **fields: Any) -> Iterator[None]:
    """Context manager: log the platform's records to stderr, with these fields in every JSON line."""
    logger = logging.getLogger(logs.PLATFORM)
    level, handlers = logger.level, list(logger.handlers)
    logs.configure(settings, logs.PLATFORM)
    try:
        with logs.bound(**fields):
            yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
