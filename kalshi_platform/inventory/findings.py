"""Run a check's SQL once: return its first rows, their number, and the episodes that they form.

Findings of one market within a minute of each other are an episode. One query returns all of it, because a
check over millions of decisions takes seconds. Which checks exist is in audit.py; breaks.py uses the episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from kalshi_platform.clickhouse.client import Client, translated

QUIET = timedelta(seconds=60)
"""An episode ends after this time without a finding; a later finding starts another one."""
MOST_EPISODES = 500
"""Of one run: more than these are one large fault, which no list explains."""
NO_LIMIT = 1 << 62
_PLAIN = {"join_use_nulls": 0, "enable_named_columns_in_function_tuple": 1}


class Question(NamedTuple):
    """A check's SQL, which orders its rows by their time and market."""

    sql: str
    at: str
    """The column with a finding's time."""
    worst: str
    """SQL expression of a finding's size."""


@dataclass(frozen=True)
class Episode:
    """Findings of one market, each within a minute of the one before. Rows are by column name."""

    market_ticker: str
    first: datetime
    last: datetime
    findings: int
    worst: float
    example: Mapping[str, Any]
    """The first finding's row."""
    clearest: Mapping[str, Any]
    """The first row among those with the least in transit."""
    latest: Mapping[str, Any]
    """The last finding's row so far."""


@dataclass(frozen=True)
class Findings:
    """The result of a check's SQL."""

    columns: tuple[str, ...] = ()
    """Empty if there is no row."""
    rows: Sequence[tuple[Any, ...]] = field(default=(), repr=False)
    """At most `limit` rows, in the SQL's order."""
    total: int = 0
    markets: int = 0
    """Number of markets with a finding."""
    episodes: Sequence[Episode] = field(default=(), repr=False)
    """At most `MOST_EPISODES`, the earliest first."""


def read(client: Client, question: Question, values: Mapping[str, Any]) -> Findings:
    """Run the check once. `values` are the SQL's parameters; `limit` bounds the returned rows.

    Raises `StoreUnavailable` and `StoreRefused` as the store does.
    """
    sql, at, worst = question
    transit = "in_transit" if " AS in_transit" in sql else "0"
    # the checks' own SQL inside; nothing here comes from a user
    query = f"""
        SELECT market_ticker, min(at) AS first_at, max(at), count() AS findings, max(measure),
            argMin(finding, place), argMin(finding, (uncertain, place)), argMax(finding, place),
            groupArrayIf((place, finding), place <= {{shown:UInt64}}),
            sum(findings) OVER () AS total, uniqExact(market_ticker) OVER () AS markets
        FROM (
            SELECT *, sum(begins) OVER (PARTITION BY market_ticker ORDER BY place) AS episode
            FROM (
                SELECT *, n = 1 OR at > previous + toIntervalSecond({{quiet_s:UInt32}}) AS begins
                FROM (
                    SELECT market_ticker, toDateTime64({at}, 3, 'UTC') AS at,
                        if(isNaN({worst}), 0, toFloat64({worst})) AS measure, tuple(*) AS finding,
                        toFloat64({transit}) AS uncertain,
                        row_number() OVER (ORDER BY {_order(sql)}) AS place,
                        row_number() OVER by_time AS n, lagInFrame(at) OVER by_time AS previous
                    FROM ({sql})
                    WINDOW by_time AS (PARTITION BY market_ticker ORDER BY {_order(sql)}
                        ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
                )
            )
        )
        GROUP BY market_ticker, episode
        ORDER BY first_at, market_ticker
        LIMIT {{most:UInt32}}
    """  # noqa: S608
    given = {
        **values,
        "limit": NO_LIMIT,
        "shown": values["limit"],
        "quiet_s": int(QUIET.total_seconds()),
        "most": MOST_EPISODES,
    }
    with translated():
        found = client.query(query, parameters=given, settings=_PLAIN).result_rows
    if not found:
        return Findings()
    shown = sorted((one for row in found for one in row[8]), key=lambda one: int(one["place"]))
    rows = [one["finding"] for one in shown]
    columns = tuple(rows[0])[:-1]  # the last one is the SQL's own count
    return Findings(
        columns,
        [tuple(row.values())[:-1] for row in rows],
        total=int(found[0][9]),
        markets=int(found[0][10]),
        episodes=[
            Episode(str(row[0]), row[1], row[2], int(row[3]), float(row[4]), *row[5:8])
            for row in found
        ],
    )


def again(
    client: Client,
    question: Question,
    values: Mapping[str, Any],
    found: Findings,
    since: datetime,
) -> Findings:
    """Return `found` after a second run for the markets with a finding since `since`."""
    if len(found.episodes) == MOST_EPISODES:  # the others may be recent
        return read(client, question, values)
    markets = sorted({e.market_ticker for e in found.episodes if e.last >= since})
    if not markets:
        return found
    second = read(client, question, {**values, "markets": markets})
    time, ticker = found.columns.index(question.at), found.columns.index("market_ticker")
    former = [episode for episode in found.episodes if episode.market_ticker in markets]
    rows = [*(row for row in found.rows if row[ticker] not in markets), *second.rows]
    episodes = [episode for episode in found.episodes if episode not in former]
    return Findings(
        found.columns,
        sorted(rows, key=itemgetter(time, ticker))[: values["limit"]],
        total=found.total - sum(episode.findings for episode in former) + second.total,
        markets=found.markets - len(markets) + second.markets,
        episodes=sorted((*episodes, *second.episodes), key=attrgetter("first", "market_ticker"))[
            :MOST_EPISODES
        ],
    )


def _order(sql: str) -> str:
    """Return the expressions of the SQL's last ORDER BY."""
    return sql.rpartition("ORDER BY ")[2].partition("\nLIMIT")[0]
