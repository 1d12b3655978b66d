"""Fixtures: a real Dagster instance for each test, and a platform with a scripted streamer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_origin import RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.workspace.load_target import WorkspaceFileTarget

from kalshi_platform.health import planned_stop
from kalshi_platform.orchestration.host.home import prepare
from kalshi_platform_tests.orchestration.stand_in import StandInPlatform


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance that is removed after the test."""
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def platform(tmp_path: Path) -> StandInPlatform:
    """The platform on an empty data folder."""
    for prepared in (StandInPlatform.streamers, StandInPlatform.hours, StandInPlatform.rebuilt):
        prepared.clear()
    return StandInPlatform(
        overrides={"kalshi_data_dir": str(tmp_path / "data"), "use_clickhouse": "0"}
    )


@pytest.fixture
def launched_by(
    instance: dg.DagsterInstance,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], None]:
    """Give new runs the origin that `up`, a container's workspace or `dagster dev` gives them."""
    add = instance.run_storage.add_run

    def choose(program: str) -> None:
        folder = tmp_path_factory.mktemp("workspace")
        # `dagster dev` writes a workspace of its own, with such a socket.
        socket = {"up": folder / planned_stop.SOCKET, "dagster dev": folder / "tmpbagp819q"}
        if program in socket:
            path = prepare(folder, socket[program], 7).workspace
        else:
            path = folder / "workspace.yaml"
            path.write_text("load_from: [{grpc_server: {host: code, port: 4000}}]")
        [location] = WorkspaceFileTarget([str(path)]).create_origins()
        repository = RemoteRepositoryOrigin(location, "__repository__")

        def add_run(run: dg.DagsterRun) -> dg.DagsterRun:
            return add(run.with_job_origin(RemoteJobOrigin(repository, run.job_name)))

        monkeypatch.setattr(instance.run_storage, "add_run", add_run)

    return choose
