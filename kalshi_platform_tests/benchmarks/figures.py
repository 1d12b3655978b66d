"""A measured figure and its promised bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Figure:
    """One row of the table. Without a bound it is for comparison only."""

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""
    """A figure for comparison, measured in the same run."""

    @property
    def holds(self) -> bool | None:
        """Whether the bound is kept; None if there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return None

    @property
    def bound(self) -> str:
        """The bound, for people."""
        if self.at_least is not None:
            return f"≥ {number(self.at_least)}"
        return f"≤ {number(self.at_most)}" if self.at_most is not None else ""


@dataclass(frozen=True)
class Curve:
    """Resident memory over time."""

    what: str
    seconds: list[float]
    mib: list[float]


@dataclass(frozen=True)
class Section:
    """Figures that were measured together, and on what machine."""

    name: str
    at: str
    """When the measurement ended, UTC, to the minute."""
    machine: str
    load: float | None
    """The load average of the minute before it began: near 0 on an idle machine. None: not measured."""
    stolen: float
    """Share of the requested processor time that the host gave to other guests."""
    figures: list[Figure]
    curves: list[Curve]


def number(value: float) -> str:
    """Format with three significant digits and thousands separators."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def line(it: Figure) -> str:
    """One figure for the terminal."""
    verdict = {True: "kept", False: "NOT KEPT", None: ""}[it.holds]
    return f"{it.what:48} {number(it.value):>12} {it.unit:15} {it.bound:12} {verdict:8} {it.beside}".rstrip()


def show(figures: Iterable[Figure]) -> None:
    """A line for each, for one benchmark by itself."""
    for figure in figures:
        click.echo(line(figure))
