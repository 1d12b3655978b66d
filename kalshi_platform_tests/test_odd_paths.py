"""A data folder may have nearly any name; test_settings.py has the few that are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import hours, open_archive
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import migrations
from kalshi_platform.commands import doctor
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.health import health_report
from kalshi_platform.orchestration.host.home import prepare
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.streamer import stream_orderbook
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import MOST_PATH_BYTES
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests.recorder.test_streamer import wait_for
from kalshi_platform_tests.simulator_fixtures import StartSimulator

ODD = """dä ta #1 'q' "d" [a-z] {b} *c $d ;f ~g,(h)=i@j:k|l`n` %zz 100% 日本 \u202a!"""


def long_path(folder: Path, size: int) -> Path:
    """A path of so many bytes."""
    while (left := size - len(str(folder))) > 1:
        folder /= "x" * min(left - 1, 200)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd", "long"])
def test_everything_works_in_a_data_folder_of_an_odd_or_long_name(
    name: str, tmp_path: Path, start_simulator: StartSimulator
) -> None:
    data = tmp_path / ODD if name == "odd" else long_path(tmp_path, MOST_PATH_BYTES)
    data.mkdir(parents=True)
    simulator = start_simulator(markets=3, rate=100.0, rolling_markets=0)
    with running(data / "clickhouse") as url:
        settings = platform_settings.load(
            _env_file=None,
            kalshi_data_dir=data,
            clickhouse_url=url,
            kalshi_ws_url=simulator.ws_url,
            kalshi_rest_url=simulator.rest_url,
        )
        settings.exchange.key_file.parent.mkdir(parents=True)
        shutil.copy(simulator.key_file, settings.exchange.key_file)
        migrations.migrate(settings)
        streamer = Streamer(settings)
        streamer.start()
        try:
            wait_for(lambda: streamer.health().frames > 100, "frames")
            assert health_report.memory_path(settings.journal_dir()).exists()
        finally:
            assert streamer.stop(60.0)
        with clickhouse.connect(settings) as client:
            ((rows,),) = client.query("SELECT count() FROM orderbook_events").result_rows
            assert rows > 100
    archive, hour = open_archive(settings), floor_hour(datetime.now(UTC))
    assert archive.first_day() == hour.date()
    assert hours.describe(archive, archive.hours("stream_events")[0], complete=False).datasets
    home = prepare(data, tmp_path / "code.sock", 7).folder
    with dg.DagsterInstance.from_config(str(home)) as instance:
        drained = stream_orderbook.execute_in_process(
            instance=instance,
            resources={"platform": KalshiResource(overrides={"kalshi_data_dir": "x%41"})},
            raise_on_error=False,
        )
        assert instance.get_run_by_id(drained.run_id) is not None
        assert instance.all_logs(drained.run_id)
    for check in ("data folder", "archive", "foreign names", "growth", "streamer"):
        assert doctor.CHECKS[check][0](settings).line(check).isprintable()
    read = f"import polars; print(polars.read_parquet({str(archive.files('stream_events', archive.hours('stream_events')[0])[0].path)!r}, glob=False).height)"
    assert int(subprocess.check_output([sys.executable, "-c", read])) > 0
