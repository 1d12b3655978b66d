"""The planted faults as a Markdown table: what was planted, whether it was found and by which check, what it was
called, and in which words.

    python -m kalshi_platform_tests.inventory.table [--wrong]

`--wrong` leaves out what is right and says what is wrong with the rest; `--write` writes docs/inventory-faults.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from kalshi_platform.clickhouse.client import Client
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.inventory.breaks import Break
from kalshi_platform.qa.mm_inventory_qa import in_words
from kalshi_platform_tests.clickhouse.tables import migrated
from kalshi_platform_tests.inventory.faults import (
    CASES,
    FAULTS,
    Case,
    Fault,
    Verdict,
    kind_of,
    look_at,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "inventory-faults.md"
HEAD = """# What the inventory audit finds

Faults planted on healthy trading of one engine (fills in fractions, cancels, expiries, a snapshot every five minutes),
each at several sizes in a market of its own: which check finds it, the class of its breaks, and the sentence of the
largest. This page is written by `python -m kalshi_platform_tests.inventory.table --write`; `make test` holds each row
against what was expected. Other trading around the same faults: `--seed N --wrong` (2, 3 and 31: all right).
See [inventory.md](inventory.md).
"""


@click.command(help=__doc__)
@click.option("--write", is_flag=True, help="Write the page in docs/, too.")
@click.option("--wrong", is_flag=True, help="Only what is wrong, and why.")
@click.option("--seed", default=1, show_default=True, help="Other trading around the same faults.")
@click.option("--only", default="", help="Faults whose name has this in it.")
def main(write: bool, wrong: bool, seed: int, only: str) -> None:
    cases = [case for case in CASES if only in case.name]
    with database() as client:
        verdicts = look_at(client, cases, seed)
    lines = list(complaints(verdicts) if wrong else table(verdicts))
    click.echo("\n".join(lines))
    if write and not wrong:
        PAGE.write_text("\n".join([HEAD, *lines, ""]))


@contextmanager
def database() -> Iterator[Client]:
    """A database of this run's own, migrated."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder)) as url,
        migrated(url, "faults") as client,
    ):
        yield client


def table(verdicts: dict[Case, Verdict]) -> Iterator[str]:
    """A row for each fault: its sizes, and of its largest one the class and the sentence."""
    yield "| fault | sizes | found by | class | sentence |"
    yield "|---|---|---|---|---|"
    for fault in FAULTS:
        cases = [case for case in verdicts if case.fault is fault]
        if not cases:
            continue
        found = [each for case in cases for each in reported(fault, verdicts[case])]
        sizes = ", ".join(f"{case.size / 100:g}" for case in cases)
        checks = ", ".join(sorted({f"`{each.check_name}`" for each in found}))
        kinds = ", ".join(sorted({kind_of(each) for each in found}))
        sentence = in_words(found[-1].explanation).replace("|", "\\|") if found else ""
        nothing = "nothing to find" if not fault.kinds else "**not found**"
        yield f"| {fault.name} | {sizes} | {checks or nothing} | {kinds} | {sentence} |"


def reported(fault: Fault, verdict: Verdict) -> list[Break]:
    """The breaks that name the fault, or all where none does."""
    right = [each for each in verdict.found if kind_of(each) in fault.kinds]
    return right or list(verdict.found)


def complaints(verdicts: dict[Case, Verdict]) -> Iterator[str]:
    """What is wrong, and the sum."""
    for case, verdict in verdicts.items():
        for wrong in verdict.wrong:
            yield f"{case.name}: {wrong}"
    right = sum(not verdict.wrong for verdict in verdicts.values())
    yield f"{right} of {len(verdicts)} right"


if __name__ == "__main__":
    main()
