"""The page and the plot that `make bench` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Plot

from kalshi_platform_tests.benchmarks.figures import Figure, number
from kalshi_platform_tests.benchmarks.memory import BOUND_MIB, Soak
from kalshi_platform_tests.benchmarks.pipeline import Recorded
from kalshi_platform_tests.benchmarks.stages import UNIT

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "images" / "performance.png"
NOTES = "<!-- what follows is written by hand -->"
"""`make bench` writes what is above this line, and leaves what is below."""


def write(
    figures: Sequence[Figure], recorded: Recorded, soaks: Sequence[Soak], machine: str
) -> None:
    """Write both."""
    _, _, notes = PAGE.read_text().partition(NOTES) if PAGE.exists() else ("", "", "\n")
    PAGE.write_text(page(figures, recorded, machine) + NOTES + notes)
    plot(figures, soaks).savefig(PICTURE, dpi=110)


def page(figures: Sequence[Figure], recorded: Recorded, machine: str) -> str:
    """The measured part of the page."""
    lines = [
        "# Performance",
        "",
        "Written by `make bench`. Everything in the table was measured in one run, on one machine, the"
        " sender of the frames included; compare ratios rather than absolute figures.",
        "",
        f"{machine}.",
        "",
        "| what | measured | promised | kept | beside |",
        "|---|---:|---:|---|---|",
    ]
    for it in figures:
        kept = {True: "yes", False: "**no**", None: ""}[it.holds]
        lines.append(
            f"| {it.what} | {number(it.value)} {it.unit} | {it.bound} | {kept} | {it.beside} |"
        )
    lines += [
        "",
        "![Rates, where the time goes, and memory over time](images/performance.png)",
        "",
        "CPU for each frame at full speed, both stores: "
        f"streamer {recorded.streamer_us:.1f} µs, ClickHouse {recorded.clickhouse_us:.1f} µs,"
        f" sender {recorded.feeder_us:.1f} µs.",
        "",
        "",
    ]
    return "\n".join(lines)


def plot(figures: Sequence[Figure], soaks: Sequence[Soak]) -> Plot:
    """Rates beside the bare loop, the stages, and memory over time."""
    picture = Plot(figsize=(13, 3.8), layout="constrained")
    left, middle, right = picture.subplots(1, 3, width_ratios=(1, 1, 1.6))
    rates = [it for it in figures if it.unit in {"frames/s", "events/s"}]
    left.barh([it.what for it in rates], [it.value / 1e6 for it in rates], color="#3a7ca5")
    left.set_xlabel("million frames or events a second")
    left.invert_yaxis()
    stages = [it for it in figures if it.unit == UNIT]
    middle.barh([it.what for it in stages], [it.value for it in stages], color="#d98324")
    middle.set_xlabel(f"CPU, {UNIT}, each stage alone")
    middle.invert_yaxis()
    for panel in (left, middle):
        panel.tick_params(axis="y", labelsize=7)
    for soak in soaks:
        right.plot([s / 60 for s in soak.seconds], soak.mib, label=soak.what)
    right.axhline(BOUND_MIB, color="grey", linewidth=0.8, linestyle="--")
    right.set_ylim(bottom=0)
    right.set_xlabel("minutes")
    right.set_ylabel("MiB, resident, of the streamer")
    right.legend(fontsize=7, loc="lower right")
    return picture
