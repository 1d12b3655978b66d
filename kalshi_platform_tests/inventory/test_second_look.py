"""What was found so lately that rows may have come since is looked at again, in the markets where it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kalshi_platform.inventory import audit, findings, tables
from kalshi_platform.inventory.audit import Parameters
from kalshi_platform.inventory.findings import Findings, Question
from kalshi_platform_tests.inventory.planted import Planted, ago

QUESTION = Question(audit.EXPOSURE.sql(Parameters()), audit.EXPOSURE.at, audit.EXPOSURE.worst)


def values(planted: Planted, limit: int = 200) -> Mapping[str, Any]:
    parameters = Parameters(limit=limit)
    start = audit.since(planted.client, parameters)
    return audit.bound(planted.client, tables.usable(planted.client), parameters, start)


def wrong(planted: Planted, market: str, *seconds: float) -> None:
    for each in seconds:
        planted.decision(ago(each), exposure=5, open_orders_count=0, market_ticker=market)


def plain(found: Findings) -> list[tuple[Any, ...]]:
    """All but what the SQL counts in each reading, which its rows have, too."""
    episodes = [
        (
            episode.market_ticker,
            episode.first,
            episode.last,
            episode.findings,
            episode.latest["decision_id"],
        )
        for episode in found.episodes
    ]
    return [(found.total, found.markets), *found.rows, *episodes]


@pytest.mark.parametrize("limit", [1, 3, 200])
def test_a_second_look_at_the_recent_markets_is_one_at_all(planted: Planted, limit: int) -> None:
    asked = values(planted, limit)
    wrong(planted, "KXOLD-A", 900, 899, 300)
    wrong(planted, "KXNEW", 899, 20)
    wrong(planted, "KXOLD-Z", 899, 200)
    first = findings.read(planted.client, QUESTION, asked)
    wrong(planted, "KXNEW", 901, 10, 5)
    seen = findings.again(planted.client, QUESTION, asked, first, ago(60))
    assert plain(seen) == plain(findings.read(planted.client, QUESTION, asked))
    assert (seen.total, seen.markets, len(seen.rows)) == (10, 3, min(limit, 10))


def test_what_is_explained_meanwhile_is_found_no_more(planted: Planted) -> None:
    asked = values(planted)
    wrong(planted, "KXNEW", 20)
    first = findings.read(planted.client, QUESTION, asked)
    planted.client.command("TRUNCATE TABLE mm_decisions")
    seen = findings.again(planted.client, QUESTION, asked, first, ago(60))
    assert (seen.total, seen.markets, seen.rows, seen.episodes) == (0, 0, [], [])


def test_other_markets_are_not_read_twice(planted: Planted) -> None:
    asked = values(planted)
    wrong(planted, "KXOLD", 900)
    wrong(planted, "KXNEW", 20)
    first = findings.read(planted.client, QUESTION, asked)
    wrong(planted, "KXOLD", 700)
    seen = findings.again(planted.client, QUESTION, asked, first, ago(60))
    assert plain(seen) == plain(first)
    assert findings.again(planted.client, QUESTION, asked, first, ago(10)) is first


def test_beyond_the_most_episodes_everything_is_read_twice(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "MOST_EPISODES", 1)
    asked = values(planted)
    wrong(planted, "KXOLD", 30)
    first = findings.read(planted.client, QUESTION, asked)
    wrong(planted, "KXNEW", 900)
    assert findings.again(planted.client, QUESTION, asked, first, ago(60)).total == 2
