"""The page of figures: a section that is measured again takes its own place and no other's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kalshi_platform_tests.benchmarks import report
from kalshi_platform_tests.benchmarks.figures import Curve, Figure, Section


def section(name: str, value: float, mib: list[float] | None = None) -> Section:
    curves = [Curve(name, [float(n) for n in range(len(mib))], mib)] if mib else []
    figures = [Figure(f"{name} figure", value, "ms", at_most=10.0)]
    return Section(name, "2026-11-30 12:00", "2 cores", 0.1, 0.0, figures, curves)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "KEPT", tmp_path / "performance.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(report, "PICTURE", tmp_path / "performance.png")
    report.PAGE.write_text(f"before\n{report.NOTES}\nby hand\n")
    return report.PAGE


def test_a_section_measured_again_replaces_itself_alone(page: Path) -> None:
    order = ["first", "second"]
    for measured in (section("second", 5.0), section("first", 20.0), section("second", 7.0)):
        report.write(measured, order)
    text = page.read_text()
    assert text.index("## First") < text.index("## Second")
    assert "| first figure | 20.0 ms | ≤ 10.0 | **no** |" in text
    assert "| second figure | 7.00 ms | ≤ 10.0 | yes |" in text
    assert "5.00" not in text
    assert text.endswith(f"{report.NOTES}\nby hand\n")
    assert report.PICTURE.stat().st_size > 0


def test_a_thinned_curve_keeps_its_highest_point(page: Path) -> None:
    mib = [100.0] * 1_000
    mib[777] = 599.0
    (curve,) = report.thinned(section("memory", 1.0, mib)).curves
    assert len(curve.mib) <= report.POINTS
    assert max(curve.mib) == 599.0
