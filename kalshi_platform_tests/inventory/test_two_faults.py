"""Two faults in one engine at once: each is found, and named for what it is."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import closing

import pytest

from kalshi_platform.clickhouse.client import connect
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory import faults
from kalshi_platform_tests.inventory.faults import Case, Fault, Faulty, Verdict, kind_of, look_at
from kalshi_platform_tests.inventory.scenarios import Options

pytestmark = pytest.mark.timeout(600)

_LARGE = Options(minutes=14.0, quote_sizes=(700, 1500))


class _Both(Faulty):
    """Both of its parents' faults; what is counted too much is three times the fill."""

    @property
    def moved(self) -> float:
        return 3 * self.sign * self.amount / 100

    def plants(self) -> None:
        for parent in type(self).__bases__:
            if issubclass(parent, Faulty) and parent is not _Both:
                parent.plants(self)


class MissesAndCountsGhost(_Both, faults.GhostOrder, faults.MissesFill): ...


class AddsTwiceAndCountsCanceled(_Both, faults.CountsCanceled, faults.AddsTwice): ...


class RollsAndMisses(_Both, faults.RollsBefore, faults.MissesFill): ...


class OtherSignAndCountsCanceled(_Both, faults.CountsCanceled, faults.OtherSign): ...


class HoldsOnWithWrongTotal(_Both, faults.HoldsOn, faults.WrongTotal): ...


class NoSnapshotsAndCountsGhost(_Both, faults.NoSnapshots, faults.GhostOrder): ...


_GHOST = {faults.PHANTOM, faults.UNKNOWN, faults.UNEXPLAINED}
PAIRS: dict[type[_Both], tuple[Options, Set[str], Set[str]]] = {
    MissesAndCountsGhost: (_LARGE, {faults.MISSING}, _GHOST),
    AddsTwiceAndCountsCanceled: (_LARGE, {faults.INVENTED}, {faults.PHANTOM}),
    RollsAndMisses: (_LARGE, {faults.ROLLED}, {faults.MISSING}),
    OtherSignAndCountsCanceled: (faults._HELD, {faults.CONVENTION}, {faults.PHANTOM}),
    HoldsOnWithWrongTotal: (faults._SETTLES, {faults.SETTLED}, _GHOST),
    NoSnapshotsAndCountsGhost: (Options(minutes=21.0), {faults.STALE}, _GHOST),
}
"""What the engine trades in, and the kinds that name each of its faults."""
CASES = {
    pair: Case(Fault(pair.__name__, pair, frozenset(one | other), options=options), 300, 30_000)
    for pair, (options, one, other) in PAIRS.items()
}


@pytest.fixture(scope="module")
def verdicts(migrated_once: Settings) -> Iterator[dict[Case, Verdict]]:
    """All pairs side by side in one database."""
    with closing(connect(migrated_once)) as client:
        yield look_at(client, list(CASES.values()))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_each_of_two_faults_is_found_and_named(
    verdicts: dict[Case, Verdict], pair: type[_Both]
) -> None:
    _, one, other = PAIRS[pair]
    found = [(kind_of(each), each.explanation) for each in verdicts[CASES[pair]].found]
    kinds = {kind for kind, _ in found}
    assert kinds & one, found
    assert kinds & other, found
    assert kinds <= one | other | {faults.UNKNOWN, faults.UNEXPLAINED}, found
