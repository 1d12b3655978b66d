"""What other programs rely on: the package's types, its version, what importing it loads."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from datetime import date
from pathlib import Path

import kalshi_platform
from kalshi_platform import exchange

ROOT = Path(__file__).resolve().parents[1]
LIGHT = [
    "kalshi_platform.engine",
    "kalshi_platform.analytics.replay",
    "kalshi_platform.archive",
    "kalshi_platform.reading",
    *(f"{exchange.__name__}.{module.name}" for module in pkgutil.iter_modules(exchange.__path__)),
]
"""What an engine, or a reader of the archive, imports."""


def test_recorder_and_readers_load_neither_dagster_nor_chdb() -> None:
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sorted({'dagster', 'chdb'} & sys.modules.keys()), len(sys.argv))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *LIGHT],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert len(LIGHT) > 10
    assert done.stdout == f"[] {len(LIGHT) + 1}\n"


def test_the_reader_is_imported_in_less_than_a_second_of_processor_time() -> None:
    program = "import time, kalshi_platform.reading; print(time.process_time())"
    took = [
        float(
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, check=True, timeout=120
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(took) < 1


def test_every_name_of_the_package_can_be_imported() -> None:
    assert kalshi_platform.__all__[0] == "__version__"
    for name in kalshi_platform.__all__[1:]:
        importlib.import_module(f"kalshi_platform.{name}")


def test_the_wheel_has_the_types_and_the_version(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    version = kalshi_platform.__version__
    with zipfile.ZipFile(wheel) as files:
        assert "kalshi_platform/py.typed" in files.namelist()
        metadata = files.read(f"kalshi_platform-{version}.dist-info/METADATA").decode()
    assert f"\nVersion: {version}\n" in metadata


def test_the_version_has_dated_release_notes() -> None:
    notes = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", notes, re.MULTILINE)
    assert releases[0][0] == kalshi_platform.__version__
    assert [date.fromisoformat(day) for _, day in releases]
