"""Dagster's webserver behind our check: what a link, another page and a program get from it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget

from kalshi_platform.orchestration.host.webserver import Webserver
from kalshi_platform_tests.test_browsers import LINK, served

MUTATION = {"query": "mutation { reloadWorkspace { __typename } }"}
QUERY = {"query": "{ version }"}


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of Dagster's webserver with an empty workspace."""
    with (
        DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as instance,
        WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as workspace,
        served(Webserver(workspace).create_asgi_app()) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as web,
    ):
        yield web


@pytest.mark.parametrize("accept", ["*/*", "application/json", "image/png", "text/html"])
def test_a_link_to_a_mutation_opens_a_page_and_runs_nothing(ui: httpx.Client, accept: str) -> None:
    for site in ("cross-site", "same-site"):
        headers = {**LINK, "sec-fetch-site": site, "accept": accept}
        answer = ui.get("/graphql", params=MUTATION, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert "reloadWorkspace" not in answer.text
        assert "initialization-data" in answer.text  # the UI, as behind every other path


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1:9"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_page_starts_nothing(ui: httpx.Client, headers: dict[str, str]) -> None:
    assert ui.post("/graphql", json=MUTATION, headers=headers).status_code == 403
    assert ui.get("/graphql", params=MUTATION, headers=headers).status_code == 403
    assert ui.get("/", headers=headers).status_code == 403


def test_own_pages_and_programs_are_answered(ui: httpx.Client) -> None:
    own = f"{ui.base_url.scheme}://{ui.base_url.host}:{ui.base_url.port}"
    for headers in ({}, {"origin": own}, {"origin": own, "sec-fetch-site": "same-origin"}):
        assert "version" in ui.post("/graphql", json=QUERY, headers=headers).json()["data"]
        mutated = ui.post("/graphql", json=MUTATION, headers=headers).json()["data"]
        assert mutated["reloadWorkspace"]["__typename"] == "Workspace"
    assert "version" in ui.get("/graphql", params=QUERY).json()["data"]
