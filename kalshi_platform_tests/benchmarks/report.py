"""Write the page and the plot of `make bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from matplotlib.figure import Figure as Plot

from kalshi_platform_tests.benchmarks.figures import Curve, Figure, Section, number
from kalshi_platform_tests.benchmarks.memory import BOUND_MIB
from kalshi_platform_tests.benchmarks.stages import UNIT

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT = DOCS / "performance.json"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "images" / "performance.png"
NOTES = "<!-- what follows is written by hand -->"
"""`make bench` writes what is above this line, and leaves what is below."""
POINTS = 120
"""Of a curve that are kept."""


def write(measured: Section, order: Sequence[str]) -> None:
    """Replace the section of the same name, and write the page and the plot from all sections."""
    before = msgspec.json.decode(KEPT.read_bytes(), type=list[Section]) if KEPT.exists() else []
    sections = {section.name: section for section in [*before, thinned(measured)]}
    kept = [sections[name] for name in order if name in sections]
    KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    _, _, notes = PAGE.read_text().partition(NOTES) if PAGE.exists() else ("", "", "\n")
    PAGE.write_text(page(kept) + NOTES + notes)
    figures = [figure for section in kept for figure in section.figures]
    curves = [curve for section in kept for curve in section.curves]
    plot(figures, curves).savefig(PICTURE, dpi=110)


def thinned(section: Section) -> Section:
    """The section with at most POINTS points of each curve, each the highest of those that it stands for."""
    curves = []
    for curve in section.curves:
        step = -(-len(curve.mib) // POINTS) or 1
        spans = range(0, len(curve.mib), step)
        curves.append(
            Curve(
                curve.what,
                [round(curve.seconds[at], 1) for at in spans],
                [round(max(curve.mib[at : at + step]), 1) for at in spans],
            )
        )
    return replace(section, curves=curves)


def page(sections: Sequence[Section]) -> str:
    """The measured part of the page."""
    lines = [
        "# Performance",
        "",
        "Written by `make bench`. The figures of a section were measured in one run on one machine, the sender"
        " of the frames included: compare them within it, ratios rather than absolute figures. `load` is the"
        " machine's load average before the section began, `stolen` the share of the processor time that the"
        " host gave to others.",
        "",
        f"{sections[-1].machine}.",
        "",
    ]
    for section in sections:
        lines += [
            f"## {section.name[0].upper()}{section.name[1:]}",
            "",
            f"{section.at} UTC, load {'not measured' if section.load is None else f'{section.load:.1f}'},"
            f" stolen {section.stolen:.0%}:"
            f" `make bench BENCH_ARGS=\"--section '{section.name}'\"`",
            "",
            "| what | measured | promised | kept | beside |",
            "|---|---:|---:|---|---|",
        ]
        for figure in section.figures:
            kept = {True: "yes", False: "**no**", None: ""}[figure.holds]
            lines.append(
                f"| {figure.what} | {number(figure.value)} {figure.unit} | {figure.bound} | {kept} | {figure.beside} |"
            )
        lines.append("")
    lines += [
        "![Rates, where the time goes, and memory over time](images/performance.png)",
        "",
        "",
    ]
    return "\n".join(lines)


def plot(figures: Sequence[Figure], curves: Sequence[Curve]) -> Plot:
    """Rates beside the bare loop, the stages, and, if it was measured, memory over time."""
    picture = Plot(figsize=(13, 3.8), layout="constrained")
    left, middle, *rest = picture.subplots(1, 3 if curves else 2)
    rates = [figure for figure in figures if figure.unit in {"frames/s", "events/s"}]
    left.barh([rate.what for rate in rates], [rate.value / 1e6 for rate in rates], color="#3a7ca5")
    left.set_xlabel("million frames or events a second")
    left.invert_yaxis()
    stages = [figure for figure in figures if figure.unit == UNIT]
    middle.barh(
        [stage.what for stage in stages], [stage.value for stage in stages], color="#d98324"
    )
    middle.set_xlabel(f"CPU, {UNIT}, each stage alone")
    middle.invert_yaxis()
    for panel in (left, middle):
        panel.tick_params(axis="y", labelsize=7)
    for panel in rest:
        for curve in curves:
            panel.plot([s / 60 for s in curve.seconds], curve.mib, label=curve.what)
        panel.axhline(BOUND_MIB, color="grey", linewidth=0.8, linestyle="--")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("minutes")
        panel.set_ylabel("MiB, resident, of the streamer")
        panel.legend(fontsize=7, loc="lower right")
    return picture
