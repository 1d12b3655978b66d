"""LOG_FORMAT=json: every line is one JSON object, whichever logger writes it, without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform import logs
from kalshi_platform import settings as platform_settings

log = logging.getLogger("kalshi_platform.somewhere")

RUN = """
import sys
import dagster as dg
from kalshi_platform.definitions import defs
from kalshi_platform.orchestration.console import output_log
from kalshi_platform import settings
import logging

@dg.op
def speak(context):
    context.log.info("Said by the op.")
    with output_log(settings.load(), shard=3, run_id=context.run_id):
        logging.getLogger("kalshi_platform.recorder").info("Said by the platform.")
    raise ValueError("broken")

@dg.job
def speech():
    speak()

with dg.DagsterInstance.ephemeral() as instance:
    print(speech.execute_in_process(instance=instance, raise_on_error=False).run_id)
"""


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, platform = logging.getLogger(), logging.getLogger(logs.PLATFORM)
    before = (list(root.handlers), list(platform.handlers), platform.level, sys.excepthook)
    yield
    root.handlers[:], platform.handlers[:] = before[0], before[1]
    platform.setLevel(before[2])
    sys.excepthook = before[3]


def lines(**overrides: Any) -> Iterator[list[dict[str, Any]]]:
    """Start to capture; the iterator's second item is what was logged since."""
    stream = io.StringIO()
    logs.configure(
        platform_settings.load(_env_file=None, log_format="json", **overrides), stream=stream
    )
    yield []
    yield [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_time_level_logger_and_message() -> None:
    logged = lines()
    next(logged)
    with logs.bound(shard=2, run_id="abc"):
        log.info("%d frames\nin two lines", 7)
    log.warning("Ünïcode")
    first, second = next(logged)
    assert first == {
        "ts": first["ts"],
        "level": "INFO",
        "logger": "kalshi_platform.somewhere",
        "message": "7 frames\nin two lines",
        "shard": 2,
        "run_id": "abc",
    }
    assert first["ts"].endswith("Z")
    assert abs((datetime.fromisoformat(first["ts"]) - datetime.now(UTC)).total_seconds()) < 60
    assert second["message"] == "Ünïcode"
    assert "shard" not in second


def test_an_exception_has_its_traceback() -> None:
    logged = lines()
    next(logged)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("It broke.")
    (line,) = next(logged)
    assert line["message"] == "It broke."
    assert "Traceback" in line["exception"]
    assert "ValueError: broken" in line["exception"]


def test_the_level_is_the_platforms_own_and_libraries_stay_quiet() -> None:
    logged = lines(log_level="debug")
    next(logged)
    log.debug("ours")
    logging.getLogger("websockets.client").debug("> KALSHI-ACCESS-SIGNATURE: s3cr3t")
    logging.getLogger("httpx").info("HTTP Request: POST https://hooks/s3cr3t")
    assert [line["message"] for line in next(logged)] == ["ours"]


def test_configuring_twice_logs_each_record_once() -> None:
    for logged in (lines(), lines()):
        next(logged)
    log.warning("once")
    assert len(next(logged)) == 1


def environment(folder: Path, **values: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "KALSHI_DATA_DIR": str(folder / "data"),
        "LOG_FORMAT": "json",
        **values,
    }


def test_the_output_of_a_dagster_run_is_json_line_by_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    run_id = done.stdout.strip()
    logged_lines = [json.loads(line) for line in done.stderr.splitlines()]
    by_message = {line["message"]: line for line in logged_lines}
    assert by_message["Said by the op."]["run_id"] == run_id
    assert by_message["Said by the op."]["job"] == "speech"
    assert by_message["Said by the op."]["step"] == "speak"
    platform = by_message["Said by the platform."]
    assert (platform["shard"], platform["run_id"]) == (3, run_id)
    assert any(line["level"] == "ERROR" for line in logged_lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stream"], "PROD_KEYID is not set, and the exchange simulator is not running"),
        (["sql", "SELECT 1"], "ClickHouse at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_an_error_that_ends_a_command_is_a_json_line(
    argv: list[str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kalshi_platform", *argv],
        cwd=tmp_path,
        env=environment(tmp_path, CLICKHOUSE_URL="http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    logged_lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert logged_lines[-1]["level"] == "ERROR"
    assert message in logged_lines[-1]["message"]
