"""Draw an hour of each dataset as a PNG: prices and activity, depth, imbalance; small enough for a Dagster event.

Prices are dollars, sizes contracts, times minutes of the hour by receive time. States that are not verified
are left out of every line. Nothing is computed here but what a drawing needs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from kalshi_platform.analytics.activity import Activity
from kalshi_platform.analytics.columns import Floats
from kalshi_platform.analytics.frames import SECOND_US
from kalshi_platform.printable import printable
from kalshi_platform.schema import DEPTH, IMBALANCE, SPREADS

_STYLE: Any = {
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 9,
    "text.parse_math": False,  # a ticker is not a formula
    "text.usetex": False,
}
_LONGEST_LABEL = 60
_COLOURS = 48  # colours of the picture: a third of the bytes, without a visible difference


def plot(dataset: str, activity: Activity, table: pa.Table) -> bytes:
    """Draw one dataset's hour as a PNG. The same rows give the same bytes.

    Only the busiest markets of `table` are drawn.
    """
    drawing = _DRAWINGS[dataset]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 5), dpi=85, layout="constrained")
        figure.suptitle(f"{dataset}, {activity.hour:%Y-%m-%d %H:00} UTC")
        drawing(figure, activity, table)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    png = io.BytesIO()
    picture.quantize(_COLOURS).save(png, "PNG", optimize=True)
    return png.getvalue()


def _spreads(figure: Figure, activity: Activity, table: pa.Table) -> None:
    mid, spread, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    for ticker, rows in _markets(activity, table):
        minutes = _minutes(activity, rows["ingest_ts"])
        _line(mid, minutes, _verified(rows, "mid"), ticker)
        _line(spread, minutes, 100 * _verified(rows, "spread"), ticker)
    rate.stairs(activity.by_minute / 60, np.arange(61), fill=True, alpha=0.5)
    mid.set(title="mid of the busiest markets", ylabel="dollars")
    spread.set(title="spread", ylabel="cents")
    rate.set(title="frames of all markets", ylabel="per second", xlabel="minute", xlim=(0, 60))
    _legend(mid)


def _depth(figure: Figure, activity: Activity, table: pa.Table) -> None:
    profile, over_time = figure.subplots(1, 2)
    distances = {"": 0, "_1c": 1, "_2c": 2, "_5c": 5, "_10c": 10}
    for ticker, rows in _markets(activity, table):
        bids, asks = (
            [_median(_verified(rows, f"{side}_size{n}")) for n in distances]
            for side in ("bid", "ask")
        )
        cents = list(distances.values())
        (line,) = profile.plot([-c for c in cents], bids, "o-", label=_label(ticker), ms=3)
        profile.plot(cents, asks, "s--", color=line.get_color(), ms=3)
        minutes = _minutes(activity, rows["second"])
        _line(over_time, minutes, _verified(rows, "bid_size_10c"), ticker)
        over_time.plot(
            minutes,
            -_verified(rows, "ask_size_10c"),
            drawstyle="steps-post",
            lw=0.8,
            color=over_time.lines[-1].get_color(),
        )
    profile.set(
        title="depth profile: median size within so many cents",
        xlabel="cents below the best bid | above the best ask",
        ylabel="contracts",
    )
    over_time.set(title="within 10 cents: bids above, asks below 0", xlabel="minute", xlim=(0, 60))
    for axes in (profile, over_time):  # so that small markets are visible beside one with millions
        axes.set_yscale("symlog", linthresh=100)
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}"
        )  # the default formatter writes formulas
    _legend(profile)


def _imbalance(figure: Figure, activity: Activity, table: pa.Table) -> None:
    ratio, flow = figure.subplots(2, 1, sharex=True)
    for ticker, rows in _markets(activity, table):
        minutes = _minutes(activity, rows["second"])
        _line(ratio, minutes, _verified(rows, "imbalance_5c"), ticker)
        _line(flow, minutes, np.nancumsum(_verified(rows, "ofi")), ticker)
    ratio.set(title="imbalance within 5 cents of the busiest markets", ylim=(-1.05, 1.05))
    flow.set(
        title="order-flow imbalance, summed", ylabel="contracts", xlabel="minute", xlim=(0, 60)
    )
    _legend(ratio)


_DRAWINGS: dict[str, Callable[[Figure, Activity, pa.Table], None]] = {
    SPREADS.name: _spreads,
    DEPTH.name: _depth,
    IMBALANCE.name: _imbalance,
}


def _markets(activity: Activity, table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    tickers = table["market_ticker"].cast(pa.string())
    for ticker in activity.busiest():
        rows = table.filter(pc.equal(tickers, ticker))
        if rows.num_rows:
            yield ticker, rows


def _line(axes: Axes, minutes: Floats, values: Floats, label: str) -> None:
    axes.plot(minutes, values, drawstyle="steps-post", lw=0.8, label=_label(label))


def _label(ticker: str) -> str:
    """Return a ticker on one line, not beginning with `_`, which would leave it out of the legend."""
    text = printable(ticker)[:_LONGEST_LABEL]
    return f" {text}" if text.startswith("_") else text


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right", fontsize=7)


def _start_us(activity: Activity) -> int:
    return int(activity.hour.timestamp()) * SECOND_US


def _minutes(activity: Activity, times: pa.ChunkedArray) -> Floats:
    us = times.cast(pa.int64()).to_numpy() - _start_us(activity)
    return np.asarray(us / (60 * SECOND_US), dtype=np.float64)


def _verified(rows: pa.Table, name: str) -> Floats:
    """Return a column as floats, NaN where it is null or not verified."""
    return np.where(rows["verified"].to_numpy(), _numbers(rows, name), np.nan)


def _median(values: Floats) -> float:
    """Return the median of the values that are not NaN; NaN, which is not drawn, if there are none."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else np.nan


def _numbers(rows: pa.Table, name: str) -> Floats:
    """Return a column as floats, NaN where it is null; exact enough for a drawing."""
    return np.asarray(pc.fill_null(rows[name].cast(pa.float64()), np.nan).to_numpy())
