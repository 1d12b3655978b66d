"""Deployment files name existing things, set known settings, and leave nothing open."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml  # type: ignore[import-untyped]

from kalshi_platform import __version__
from kalshi_platform.settings import Settings, load

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose" / "compose.yaml"
DOCKERFILE = INFRA / "docker" / "Dockerfile"
KUBERNETES = sorted((INFRA / "kubernetes").glob("*.yaml"))
OURS = {name.upper() for name in Settings.model_fields}
DAGSTERS = set(
    re.findall(
        r"env: (\w+)",
        "".join(path.read_text() for path in sorted((INFRA / "dagster").glob("*.yaml"))),
    )
)
"""Environment variables that the platform's Dagster files read."""
OTHERS = {
    "clickhouse": {
        *("CLICKHOUSE_USER", "CLICKHOUSE_PASSWORD", "CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT"),
        *(f"KALSHI_{role}_PASSWORD" for role in ("READER", "WRITER", "OPERATOR", "ADMIN")),
    },
    "postgres": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD"},
    "grafana": {"CLICKHOUSE_HOST", "KALSHI_READER_PASSWORD"},
}
"""Environment variables that other images, and the platform's files in them, read."""


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def everywhere(value: Any, key: str) -> Iterator[Any]:
    """The values of `key` at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from everywhere(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from everywhere(inner, key)


def images() -> list[str]:
    found = [str(image) for image in everywhere(compose(), "image")]
    for path in KUBERNETES:
        for image in (i for one in documents(path) for i in everywhere(one, "image")):
            found.append(
                image if isinstance(image, str) else f"{image['repository']}:{image['tag']}"
            )
    return [*found, *re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)]


def test_the_dockerfile_has_nothing_that_its_linter_finds() -> None:
    binary = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([binary, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_matches_composes_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, COMPOSE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_manifests_match_kubernetes_schemas(path: Path) -> None:
    """The manifests of Kubernetes' own kinds; the operator's kinds and the chart's values have no schema here."""
    for one in documents(path):
        if path.stem == "dagster-values" or "altinity.com" in one["apiVersion"]:
            continue
        kubernetes_validate.validate(one, "1.34", strict=True)


def test_every_image_has_an_exact_version() -> None:
    """ClickHouse's version has four numbers: a tag with two can change."""
    for image in images():
        name, _, tag = image.partition(":")
        exact = r"\d+(\.\d+){3}" if name.startswith("clickhouse/") else r"\d+\.\d+"
        assert re.match(exact, tag), f"{name} has no exact version: {tag!r}"


DECIDED = {
    "KALSHI_DATA_DIR": "the image says where its volume is",
    "MARKET_FILE": "a file within a container: MARKET_TICKERS",
    "USE_CLICKHOUSE": "there is one",
    "EMBEDDED_CLICKHOUSE_PORT": "that is not embedded",
    "CLICKHOUSE_DATABASE": "users, rights and Grafana name it",
    "CLICKHOUSE_CLUSTER": "of Kubernetes alone",
    "CLICKHOUSE_CA_FILE": "of Kubernetes alone",
    "CLICKHOUSE_CLIENT_CERT_FILE": "the users have passwords",
    "CLICKHOUSE_CLIENT_KEY_FILE": "the users have passwords",
    "METRICS_HOST": "the part's own command",
    "METRICS_PORT": "the part's own command",
    "SIMULATOR_PORT": "within the code location's network",
    **{name: "of a person's command line" for name in sorted(OURS) if re.match("CH_", name)},
}
"""Settings that a deployment does not use or sets itself, with the reason."""


def test_compose_passes_every_setting() -> None:
    example = (COMPOSE.parent / "platform.env.example").read_text()
    offered = set(re.findall(r"^#([A-Z0-9_]+)=", example, re.MULTILINE))
    services = compose()["services"]
    decided = set(services["code-location"]["environment"]) & OURS
    assert offered | decided | set(DECIDED) == OURS
    assert not offered & (decided | set(DECIDED))
    for name in ("code-location", "migrate", "metrics", "simulator"):
        assert services[name]["env_file"] == [{"path": "platform.env", "required": False}], name


def test_compose_and_kubernetes_show_the_true_defaults() -> None:
    example = (COMPOSE.parent / "platform.env.example").read_text()
    shown = dict(re.findall(r"^#([A-Z0-9_]+)=(.+)$", example, re.MULTILINE))
    chosen = {"MARKET_SERIES", "LOG_FORMAT"}  # an example, and a line for a log collector
    in_kubernetes = {k: v for k, v in settings_map().items() if v and k not in chosen}
    for values in (shown, in_kubernetes):
        assert given(values) == given({})


def given(values: dict[str, str]) -> Settings:
    return load(_env_file=None, **{name.lower(): value for name, value in values.items()})


def settings_map() -> dict[str, str]:
    """The settings of the file, including those in comments."""
    path = INFRA / "kubernetes" / "settings.yaml"
    (found,) = documents(path)
    commented = re.findall(r'^  # ([A-Z_]+): "(.*)"$', path.read_text(), re.MULTILINE)
    return {**found["data"], **dict(commented)}


def test_kubernetes_passes_every_setting_and_secrets_by_secrets() -> None:
    text = (INFRA / "kubernetes" / "settings.yaml").read_text()
    secret = set(re.findall(r"--from-literal=(\w+)", text))
    (stateful,) = [
        one
        for one in documents(INFRA / "kubernetes" / "code-location.yaml")
        if one["kind"] == "StatefulSet"
    ]
    (env,) = everywhere(stateful, "env")
    decided = {entry["name"] for entry in env} & OURS
    unused = {name for name in OURS if name.startswith("SIMULATOR_")}
    offered = set(settings_map())
    assert offered | secret | decided | set(DECIDED) | unused == OURS
    assert not offered & (secret | decided | set(DECIDED))
    fields = Settings.model_fields
    assert not {n for n in offered if "SecretStr" in str(fields[n.lower()].annotation)}
    given(settings_map())
    for container in (c for entry in everywhere(stateful, "containers") for c in entry):
        assert {"configMapRef": {"name": "kalshi-settings"}} in container["envFrom"]


def test_recording_waits_for_no_migration() -> None:
    needs = compose()["services"]["code-location"]["depends_on"]
    assert set(needs) == {"postgres"}  # Dagster's own storage


def test_acknowledged_inserts_survive_a_power_failure() -> None:
    for file in ("compose/clickhouse/server.xml", "kubernetes/clickhouse.yaml"):
        (section,) = re.findall(
            r"<merge_tree>(.*?)</merge_tree>", (INFRA / file).read_text(), re.DOTALL
        )
        for setting in ("fsync_after_insert", "fsync_part_directory"):
            assert f"<{setting}>1</{setting}>" in section, file


def test_every_container_is_bounded() -> None:
    for name, service in compose()["services"].items():
        assert service.get("mem_limit"), name
    for path in KUBERNETES:
        for resources in (r for one in documents(path) for r in everywhere(one, "resources")):
            if "storage" in resources["requests"]:
                continue
            assert set(resources["requests"]) == {"cpu", "memory"}, path
            assert set(resources["limits"]) == {"cpu", "memory"}, path


def test_no_frequent_probe_starts_python() -> None:
    for name, service in compose()["services"].items():
        check = service.get("healthcheck", {})
        if set(check.get("test", [])) & {"python", "dagster-daemon"}:
            assert int(check["interval"].removesuffix("s")) >= 300, name
    for path in KUBERNETES:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            for probe in (p for one in documents(path) for p in everywhere(one, kind)):
                assert "exec" not in probe, path


def test_services_without_login_are_closed_to_the_cluster() -> None:
    policies = [
        one
        for one in documents(INFRA / "kubernetes" / "network.yaml")
        if one["kind"] == "NetworkPolicy"
    ]
    selected = [one["spec"]["podSelector"]["matchLabels"] for one in policies]
    assert {"app": "kalshi-code"} in selected
    assert {"clickhouse.altinity.com/chi": "kalshi"} in selected
    assert {"clickhouse-keeper.altinity.com/chk": "kalshi"} in selected
    for one in policies:
        assert all(rule.get("from") for rule in one["spec"]["ingress"])


def kubernetes(kind: str) -> list[dict[str, Any]]:
    """The manifests of a kind, from every file."""
    return [one for path in KUBERNETES for one in documents(path) if one.get("kind") == kind]


def test_disruption_budgets_hold_the_recorder_and_a_majority_of_keeper() -> None:
    """A drained node never evicts the one recorder, nor more voters than Keeper can spare."""
    budgets = {
        tuple(one["spec"]["selector"]["matchLabels"].items()): one["spec"]["maxUnavailable"]
        for one in kubernetes("PodDisruptionBudget")
    }
    (recorder,) = kubernetes("StatefulSet")
    assert recorder["spec"]["replicas"] == 1
    labels = recorder["spec"]["template"]["metadata"]["labels"]
    assert budgets.pop(tuple(labels.items())) == 0
    (keeper,) = kubernetes("ClickHouseKeeperInstallation")
    (voters,) = everywhere(keeper, "replicasCount")
    label = ("clickhouse-keeper.altinity.com/chk", keeper["metadata"]["name"])
    assert 0 < budgets.pop((label,)) < voters / 2
    assert budgets == {}


def test_no_start_changes_the_owner_of_every_file() -> None:
    """Kubernetes does so for each volume of a pod with `fsGroup`, which takes long for a large archive."""
    groups = [one for path in KUBERNETES for doc in documents(path) for one in contexts(doc)]
    assert len(groups) == len(kubernetes("StatefulSet")) + sum(
        len(list(everywhere(one, "podTemplates")))
        for kind in ("ClickHouseInstallation", "ClickHouseKeeperInstallation")
        for one in kubernetes(kind)
    )
    assert {one["fsGroupChangePolicy"] for one in groups} == {"OnRootMismatch"}


def contexts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The security contexts in a manifest that give volumes to a group."""
    return [one for one in everywhere(document, "securityContext") if "fsGroup" in one]


def test_prometheus_scrapes_the_metrics_container() -> None:
    """By its annotations, through the network policy, at the port at which the container serves."""
    (recorder,) = kubernetes("StatefulSet")
    template = recorder["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    port = int(annotations["prometheus.io/port"])
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations.get("prometheus.io/path", "/metrics") == "/metrics"
    (metrics,) = (one for one in template["spec"]["containers"] if one["name"] == "metrics")
    assert metrics["args"][:2] == ["kalshi-platform", "metrics"]
    assert metrics["args"][metrics["args"].index("--port") + 1] == str(port)
    assert metrics["args"][metrics["args"].index("--host") + 1] == "0.0.0.0"
    assert [one["containerPort"] for one in metrics["ports"]] == [port]
    (policy,) = (
        one for one in kubernetes("NetworkPolicy") if one["metadata"]["name"] == "kalshi-code"
    )
    opened = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": port}]]
    assert [list(everywhere(rule, "app.kubernetes.io/name")) for rule in opened] == [["prometheus"]]


def test_our_image_is_of_this_version() -> None:
    ours = {image for image in images() if image.startswith("kalshi-platform:")}
    assert ours == {f"kalshi-platform:{__version__}"}
    assert f"-t kalshi-platform:{__version__} ." in DOCKERFILE.read_text()


def test_ports_are_published_on_the_loopback_interface_only() -> None:
    for name, service in compose()["services"].items():
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name}: {port}"
        assert service.get("network_mode") in {None, "service:code-location"}, name
        assert not service.get("privileged")
    for path in KUBERNETES:
        for kind in (t for one in documents(path) for t in everywhere(one, "type")):
            assert kind not in {"LoadBalancer", "NodePort"}, path


def test_every_variable_of_a_container_is_read() -> None:
    for name, service in compose()["services"].items():
        known = OTHERS.get(name, OURS | DAGSTERS)
        unknown = {
            variable
            for variable in service.get("environment", {})
            if variable not in known and not variable.startswith("GF_")
        }
        assert not unknown, f"{name}: {sorted(unknown)}"
    for path in KUBERNETES:
        for env in (e for one in documents(path) for e in everywhere(one, "env")):
            unknown = {entry["name"] for entry in env} - OURS - DAGSTERS
            assert not unknown, f"{path.name}: {sorted(unknown)}"
    for variable in re.findall(r"^(?:ENV|   ) (\w+)=", DOCKERFILE.read_text(), re.MULTILINE):
        assert variable in OURS | DAGSTERS | {"PATH", "PYTHONUNBUFFERED", "DAGSTER_HOME"} or (
            variable.startswith("PIP_")
        )


def test_the_ui_refuses_other_sites() -> None:
    command = compose()["services"]["webserver"]["command"]
    assert command[:3] == ["python", "-m", "kalshi_platform.orchestration.host.webserver"]


def test_the_code_server_is_the_platforms_own() -> None:
    ours = ["python", "-m", "kalshi_platform.orchestration.host.code_server", "api", "grpc"]
    assert compose()["services"]["code-location"]["command"][:5] == ours
    args = [
        args
        for one in documents(INFRA / "kubernetes" / "code-location.yaml")
        for args in everywhere(one, "args")
    ]
    assert args[0][:5] == ours
    assert args[1][:2] == ["kalshi-platform", "metrics"]


def test_every_variable_that_dagster_s_files_read_is_set() -> None:
    for name in ("code-location", "webserver", "daemon"):
        environment = compose()["services"][name]["environment"]
        assert set(environment) >= DAGSTERS, name
    (stateful,) = [
        one
        for one in documents(INFRA / "kubernetes" / "code-location.yaml")
        if one["kind"] == "StatefulSet"
    ]
    (env,) = everywhere(stateful, "env")
    assert {entry["name"] for entry in env} | {
        "DAGSTER_LOCAL_DIR"
    } >= DAGSTERS  # the image sets that


def test_the_compose_file_s_own_variables_are_in_its_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    example = (COMPOSE.parent / ".env.example").read_text()
    assert used == set(re.findall(r"^#?([A-Z0-9_]+)=", example, re.MULTILINE))


def test_every_named_file_exists() -> None:
    file = compose()
    for name, service in file["services"].items():
        if build := service.get("build"):
            context = (COMPOSE.parent / build["context"]).resolve()
            assert context == ROOT
            assert (context / build["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            exists = (
                (COMPOSE.parent / source).exists()
                if source.startswith(".")
                else source in file["volumes"]
            )
            assert exists, f"{name}: {source}"
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}\n" in ignored, (
                f"{source} is not in the build's context"
            )
    script = COMPOSE.parent / "clickhouse" / "10-users.sh"
    assert os.access(script, os.X_OK)
    for source in re.findall(r"/opt/clickhouse_users/(\S+)", script.read_text()):
        assert (INFRA / "clickhouse_users" / source).is_file()


def test_secrets_are_references() -> None:
    for path in KUBERNETES:
        text = path.read_text(encoding="utf-8")
        for one in documents(path):
            assert one.get("kind") != "Secret", path
        for env in (e for one in documents(path) for e in everywhere(one, "env")):
            for entry in env:
                if re.search(r"PASSWORD|KEYID", entry["name"]):
                    assert "secretKeyRef" in entry["valueFrom"], f"{path.name}: {entry['name']}"
        written = re.findall(r"^\s*(\S*[Pp]assword): \S", text, re.MULTILINE)
        assert all("k8s_secret_" in name for name in written), path
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if name.endswith("PASSWORD"):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name


def test_our_containers_run_without_rights() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE.read_text(), re.MULTILINE)
    for name, service in compose()["services"].items():
        if str(service["image"]).startswith("kalshi-platform:"):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
    for path in ("code-location", "migrate"):
        for one in documents(INFRA / "kubernetes" / f"{path}.yaml"):
            for container in (c for entry in everywhere(one, "containers") for c in entry):
                assert container["securityContext"]["readOnlyRootFilesystem"], path


def test_the_image_s_first_process_signals_the_whole_group() -> None:
    entry = re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert entry is not None
    assert entry[1] == '["tini", "-g", "--"]'
    for name, service in compose()["services"].items():
        assert "entrypoint" not in service, name
    # the chart and our manifests give `args`, which leave the entry point as it is
    for path in ("code-location", "migrate"):
        for one in documents(INFRA / "kubernetes" / f"{path}.yaml"):
            for container in (c for entry in everywhere(one, "containers") for c in entry):
                assert "command" not in container
                assert container["args"]


def test_the_chart_is_of_dagster_s_version() -> None:
    import dagster

    values = (INFRA / "kubernetes" / "dagster-values.yaml").read_text()
    assert f"--version {dagster.__version__}" in values
