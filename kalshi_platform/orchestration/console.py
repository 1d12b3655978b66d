"""What a run writes to its output, which Dagster keeps with it.

Dagster's own lines come from a logger that it makes for each run; it offers another format only through
each run's configuration. In JSON that logger is replaced where Dagster looks for it.
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
    """As LOG_LEVEL has it. Not in the tree of loggers: a run's events go nowhere else."""
    settings = platform_settings.load()
    made = logging.getLoggerClass()("dagster", level=settings.log_level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logs.JsonFormatter())
    made.addHandler(handler)
    return made


def adopt() -> None:
    """Let Dagster's runs in this process log as LOG_FORMAT has it. Called with the definitions."""
    try:
        settings = platform_settings.load()
    except SettingsError:
        return  # told in full by whatever runs first
    if settings.log_format == "json":
        _loggers.colored_console_logger = json_console
        logs.configure(settings, logs.PLATFORM)


@contextmanager
def output_log(settings: Settings, **fields: Any) -> Iterator[None]:
    """The platform's log goes to stderr, with these fields on every line of JSON."""
    logger = logging.getLogger(logs.PLATFORM)
    level, handlers = logger.level, list(logger.handlers)
    logs.configure(settings, logs.PLATFORM)
    try:
        with logs.bound(**fields):
            yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
