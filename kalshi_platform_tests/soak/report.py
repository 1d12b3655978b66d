"""Write the page and the plot of `make soak`."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import psutil
from matplotlib.figure import Figure

from kalshi_platform import __version__
from kalshi_platform_tests.soak.outcome import JUDGED_S, STREAMER, Outcome

PAGE = Path(__file__).resolve().parents[2] / "docs" / "soak.md"
_STORES = {"clickhouse": "ClickHouse", "parquet": "Parquet"}
_COLOURS = ("#3a7ca5", "#d98324")


def write(outcome: Outcome, path: Path) -> str:
    """Write both, the plot into `images` beside the page; return the page."""
    picture = path.parent / "images" / f"{path.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(outcome).savefig(picture, dpi=110)
    text = page(outcome, f"images/{picture.name}")
    path.write_text(text)
    return text


def page(outcome: Outcome, picture: str) -> str:
    """The soak as a page of the docs."""
    load, first, last = outcome.load, outcome.samples[0], outcome.samples[-1]
    began, ended = (datetime.fromtimestamp(it.at, UTC) for it in (first, last))
    memory_gib = psutil.virtual_memory().total / 2**30
    lines = [
        "# Soak",
        "",
        "A complete platform under a steady load, with markets that open and close; each part is"
        " restarted once, as an operator would. This page is written by `make soak`.",
        "",
        f"{outcome.seconds / 60:.0f} minutes at {load.rate:,.0f} deltas a second, plus trades and"
        f" lifecycle messages; {load.markets} markets open at a time, {load.rolling} of which stay open for"
        f" {load.rolling_s:.0f} s each; {load.shards} shards, `MARKET_ALL`, seed {load.seed}."
        f" {os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()},"
        f" Python {platform.python_version()}, version {__version__}; {began:%Y-%m-%d %H:%M} to"
        f" {ended:%H:%M} UTC. The simulator runs on the same machine.",
        "",
        "All promises were kept." if outcome.sound else "**Not every promise was kept.**",
        "",
        "| promise | found | kept |",
        "|---|---:|---|",
        *(
            f"| {what} | {found} | {'yes' if kept else '**no**'} |"
            for what, (found, kept) in outcome.promises.items()
        ),
        "",
        f"![Memory, frames a second and lag over time]({picture})",
        "",
        *_recorded(outcome),
        *_restarts(outcome),
        *_memory(outcome),
        *_lag(outcome),
    ]
    if outcome.doctor_exit:
        lines += ["`doctor` reported failures:", "", *(f"- {line}" for line in outcome.doctor), ""]
    return "\n".join(lines)


def _recorded(outcome: Outcome) -> list[str]:
    proof, markets, last = outcome.proof, outcome.markets, outcome.samples[-1]
    sealed = ", ".join(outcome.hours_sealed) or "none: no full hour was passed"
    return [
        "## What was recorded",
        "",
        "| | journal | ClickHouse | Parquet |",
        "|---|---:|---:|---:|",
        *(
            f"| {what} | {kept.journalled:,} | {kept.hot:,} | {kept.cold:,} |"
            for what, kept in proof.kept.items()
        ),
        *(
            f"| rows, `{dataset}` | | {rows:,} | {proof.rows_cold[dataset]:,} |"
            for dataset, rows in proof.rows_hot.items()
        ),
        "",
        "| | |",
        "|---|---:|",
        f"| deltas that the exchange sent, a second | {outcome.sent_a_second:,.0f} |",
        f"| order flow that the simulator skipped | {outcome.shed_s:.1f} s |",
        f"| frames in the journals | {proof.frames:,} |",
        f"| gaps, each named by a `gap` row | {proof.gaps} |",
        f"| markets recorded / opened meanwhile / left | {markets.recorded} / {markets.opened} / {markets.left} |",
        f"| hours sealed | {sealed} |",
        f"| journal at the end | {last.journal_bytes / 2**20:,.0f} MiB |",
        f"| whole data folder at the end | {last.disk_bytes / 2**20:,.0f} MiB |",
        "",
        "Lost, doubled and missing numbers are counted over order-book events, trades and lifecycle messages;"
        " every shard's journal is compared with both stores, row counts and"
        " [lossless_proof.sql](../infra/queries/lossless_proof.sql).",
        "",
    ]


def _restarts(outcome: Outcome) -> list[str]:
    began = outcome.samples[0].at
    return [
        "## Restarts",
        "",
        "| minute | what | how | recording again | supervised again |",
        "|---:|---|---|---:|---:|",
        *(
            f"| {(restart.at - began) / 60:.1f} | {restart.name} | {restart.how} | {_seconds(restart.recording_s)} |"
            f" {_seconds(restart.supervised_s)} |"
            for restart in outcome.restarts
        ),
        "",
        "Recording again: the part runs again, frames come, every book is synced and both stores take"
        " rows. Supervised again: the web page answers and `streamer_supervisor` has checked the"
        " streamers, which it does every 5 s. Both are measured from the start of the shutdown.",
        "",
        *(
            f"- {restart.name}: {restart.trouble}"
            for restart in outcome.restarts
            if restart.trouble
        ),
        *([""] if any(restart.trouble for restart in outcome.restarts) else []),
    ]


def _memory(outcome: Outcome) -> list[str]:
    judged = (
        ""
        if outcome.steady_s >= JUDGED_S
        else f" Under {JUDGED_S / 60:.0f} minutes growth is not tested."
    )
    rows = []
    for role in outcome.roles:
        start, middle, end = (outcome.mib(role, part) for part in (0, 2, 4))
        growth = outcome.growth(role)
        rows.append(
            f"| {role} | {_mib(start)} | {_mib(middle)} | {_mib(end)} | {outcome.most_mib(role):,.0f} |"
            f" {'-' if growth is None else f'{growth:.2f}'} | {outcome.cpu(role):.1%} |"
        )
    total = sum(outcome.cpu(role) for role in outcome.roles)
    return [
        "## Memory and CPU",
        "",
        "| | start, MiB | middle | end | most | growth | CPU, of a core |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
        f"| all | | | | | | {total:.1%} |",
        "",
        "Resident memory, which counts shared pages in each process; medians over the first,"
        " the middle and the last fifth of the time. CPU of a process that started and ended between two"
        " samples is not included. Growth is the last fifth divided by the second one, of the longest"
        f" {outcome.steady_s / 60:.1f} minutes without a restart and without an hour's end, since sealing"
        " takes memory for some minutes."
        f"{judged}",
        "",
    ]


def _lag(outcome: Outcome) -> list[str]:
    rows = []
    for store, name in _STORES.items():
        for when, calm in (("all the time", False), ("after the last restart", True)):
            records = outcome.lag(store, calm=calm)
            seconds = outcome.late(store, calm=calm)
            rows.append(
                f"| {name}, {when} | "
                + " | ".join(f"{n:,.0f}" for n in records)
                + " | "
                + " | ".join(f"{s:.1f} s" for s in seconds)
                + " |"
            )
    return [
        "## Lag",
        "",
        "What the journals have and a store does not have yet.",
        "",
        "| | records, p50 | p99 | most | by time, p50 | p99 | most |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "Parquet is written once a minute by design, ClickHouse as soon as possible.",
        "",
    ]


def plot(outcome: Outcome) -> Figure:
    """Plot memory by role, frames a second, and lag; restarts are marked and numbered."""
    began = outcome.samples[0].at
    minutes = [(sample.at - began) / 60 for sample in outcome.samples]
    picture = Figure(figsize=(12, 10), layout="constrained")
    memory, rate, lag = picture.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    for role in outcome.roles:
        memory.plot(
            minutes,
            [sample.mib.get(role, float("nan")) for sample in outcome.samples],
            label=role,
            linewidth=1.6 if role.startswith(STREAMER) else 1.0,
        )
    memory.set_ylabel("MiB, resident")
    pairs = list(zip(outcome.samples, outcome.samples[1:], strict=False))
    for what, values in (
        ("deltas that the exchange sent", [b.sent - a.sent for a, b in pairs]),
        ("records journalled", [b.journalled - a.journalled for a, b in pairs]),
    ):
        rate.plot(
            minutes[1:],
            [n / (b.at - a.at) for n, (a, b) in zip(values, pairs, strict=True)],
            label=what,
        )
    rate.set_ylabel("a second")
    for (store, name), colour in zip(_STORES.items(), _COLOURS, strict=True):
        late = [sample.late_s.get(store, float("nan")) for sample in outcome.samples]
        lag.plot(minutes, late, label=name, color=colour)
    lag.set_yscale("symlog", linthresh=1.0)  # a second of one store beside the minute of the other
    lag.set_ylabel("seconds behind the journal")
    lag.set_xlabel("minutes")
    for panel in (memory, rate, lag):
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for it in outcome.restarts:
            panel.axvline((it.at - began) / 60, color="grey", linewidth=0.8, linestyle="--")
    for restart in outcome.restarts:
        memory.annotate(
            restart.name,
            ((restart.at - began) / 60, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=35,
            fontsize=7,
        )
    return picture


def _seconds(value: float | None) -> str:
    return "**not in time**" if value is None else f"{value:.1f} s"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
