"""A project folder that was copied or moved works with `make` at its new place, and changes no other folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_THE_PROJECT = (
    *("Makefile", "pyproject.toml", "README.md", "LICENSE", "dagster.yaml", "workspace.yaml"),
    *("requirements.lock", "infra", "kalshi_platform"),
)
PYTHON = Path(sys.prefix) / "bin" / "python"


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder on the environment's disk, for hard links; other temporary folders may be in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def own_copy(path: Path) -> None:
    """Replace a hard link by a copy."""
    fresh = path.with_name(f"{path.name}.own")
    shutil.copy2(path, fresh, follow_symlinks=False)
    fresh.replace(path)


def copied(folder: Path) -> Path:
    """The project's folder with its environment, as `cp -a` copies it; libraries are hard links."""
    folder.mkdir(parents=True)
    for name in OF_THE_PROJECT:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    done = subprocess.run(
        ["cp", "-al", sys.prefix, str(folder / ".venv")], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("the environment is on another file system than temporary folders")
    environment = folder / ".venv"
    (environment / ".installed").touch()
    packages = next(environment.glob("lib/python*/site-packages"))
    for path in (
        *(entry for entry in (environment / "bin").iterdir() if entry.is_file()),
        *(entry for entry in packages.glob("*kalshi*") if entry.is_file()),
        *(entry for entry in packages.glob("kalshi*/**/*") if entry.is_file()),
        environment / "pyvenv.cfg",
        environment / ".installed",
    ):
        own_copy(path)
    (environment / ".installed").touch()
    return folder


def made(folder: Path, *argv: str) -> str:
    base = getattr(sys, "_base_executable", sys.executable)
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "HOME"}}
    done = subprocess.run(
        ["make", f"PYTHON={base}", "COMPILE=true", *argv],
        cwd=folder,
        env={**kept, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def output_of(*argv: str | Path) -> str:
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "HOME"}}
    done = subprocess.run(
        [str(entry) for entry in argv],
        cwd="/",
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(sys.prefix) / "bin" / "kalshi-platform").is_file(),
    reason="the package is not installed into an environment here",
)
def test_make_repairs_the_environment_of_a_moved_or_copied_one(on_disk: Path) -> None:
    programs = {
        path: path.read_bytes()
        for path in (Path(sys.prefix) / "bin").iterdir()
        if path.is_file() and not path.is_symlink()
    }
    folder = copied(on_disk / "copy of it")
    assert "This folder was moved or copied" in made(folder, "install")
    assert "moved" not in made(folder, "install")
    moved = folder.rename(on_disk / "moved")
    assert "not found" in output_of("sh", "-c", f"{moved}/.venv/bin/kalshi-platform --version")
    assert "This folder was moved or copied" in made(moved, "install")
    assert "moved" not in made(moved, "install")
    bin_folder = moved / ".venv" / "bin"
    assert output_of(bin_folder / "kalshi-platform", "--version").startswith(
        "kalshi-platform, version"
    )
    assert "version" in output_of(bin_folder / "dagster", "--version")
    where = "import kalshi_platform; print(kalshi_platform.__file__)"
    assert output_of(bin_folder / "python", "-c", where).strip() == str(
        moved / "kalshi_platform" / "__init__.py"
    )
    show = "from kalshi_platform.settings import project; print(project().folder)"
    assert output_of(bin_folder / "python", "-c", show).strip() == str(moved)
    assert all(path.read_bytes() == content for path, content in programs.items())
