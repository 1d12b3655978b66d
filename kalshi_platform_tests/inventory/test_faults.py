"""Each planted fault, at several sizes, is found and named for what it is, and stays so as time passes; what is
no fault stays open nowhere.

`python -m kalshi_platform_tests.inventory.table` writes the same as a Markdown table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from kalshi_platform.clickhouse.client import connect
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.faults import CASES, Case, Verdict, look_at

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def verdicts(migrated_once: Settings) -> Iterator[dict[Case, Verdict]]:
    """All cases side by side in one database, looked at three times."""
    with closing(connect(migrated_once)) as client:
        yield look_at(client, CASES)


def test_no_two_cases_share_a_market() -> None:
    assert len({case.ticker for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_fault_is_found_and_named_for_what_it_is(
    verdicts: dict[Case, Verdict], case: Case
) -> None:
    assert verdicts[case].wrong == ()
