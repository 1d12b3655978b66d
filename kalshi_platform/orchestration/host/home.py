"""Preparation of DAGSTER_HOME, `$KALSHI_DATA_DIR/dagster`, from the two files at the project's root.

`dagster.yaml` is copied with `data` replaced by the data folder's absolute path, so that it does not depend on
the current folder. `workspace.yaml` names the code location's module; the copy names a code server instead, which
webserver and daemon reach through a socket. Dagster is not imported here, so that `up` starts fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped]

from kalshi_platform.errors import SettingsError


@dataclass(frozen=True)
class Home:
    """A prepared DAGSTER_HOME."""

    folder: Path
    workspace: Path
    """The workspace file that names the code server's socket."""
    module: str
    """The code location's module."""
    location: str
    """The code location's name."""


def prepare(data_dir: Path, socket: Path, tick_days: int, shards: int = 1) -> Home:
    """Write both files into the folder.

    Ticks that did something are kept for `tick_days`; the run queue has slots for `shards` streamers beside all
    other runs. Raises `SettingsError` if the folder cannot be written.
    """
    folder = data_dir / "dagster"
    instance = _read("dagster.yaml")
    instance["retention"] = _retention(instance["retention"], tick_days)
    instance["concurrency"]["runs"]["max_concurrent_runs"] += shards - 1
    code = _read("workspace.yaml")["load_from"][0]["python_module"]
    server = {"grpc_server": {"socket": str(socket), "location_name": code["location_name"]}}
    home = Home(folder, folder / "workspace.yaml", code["module_name"], code["location_name"])
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        _write(folder / "dagster.yaml", _relocated(instance, data_dir))
        _write(home.workspace, {"load_from": [server]})
    except OSError as error:
        raise SettingsError(
            f"KALSHI_DATA_DIR is {str(data_dir)!r}: {error.filename} cannot be written"
            f" ({error.strerror}). Give a folder that can."
        ) from None
    return home


def shipped(name: str) -> Path:
    """A file of the project's root: from the installed wheel, else from the repository."""
    package = Path(__file__).resolve().parents[2]
    bundled = package / "_infra" / name
    return bundled if bundled.is_file() else package.parent / name


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(shipped(name).read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(
        "# Written by `kalshi-platform up`; change the file of this name at the project's root.\n"
        + yaml.safe_dump(content, sort_keys=False),
        encoding="utf-8",
    )


def _retention(shipped_as: dict[str, Any], tick_days: int) -> dict[str, Any]:
    """The retention rules with `tick_days`; skipped ticks, nearly all, keep the file's own limit."""
    skipped = shipped_as["sensor"]["purge_after_days"]["skipped"]
    did_something = dict.fromkeys(("success", "failure"), tick_days)
    return {
        kind: {"purge_after_days": {"skipped": skipped, **did_something}} for kind in shipped_as
    }


def _relocated(value: Any, data_dir: Path) -> Any:
    """The settings with every `base_dir` below `data` moved below `data_dir`."""
    if not isinstance(value, dict):
        return value
    moved = {key: _relocated(inner, data_dir) for key, inner in value.items()}
    base = moved.get("base_dir")
    if isinstance(base, str):
        moved["base_dir"] = str(data_dir / PurePosixPath(base).relative_to("data"))
    return moved
