"""Classify a break and explain it in a sentence, from its findings and the rows recorded around them.

A kind needs evidence that accounts for the amount; an event nearby is not enough. If nothing accounts for the
amount, a break is unexplained. The rows are read in evidence.py; nothing is queried here.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import attrgetter, itemgetter
from typing import Any

from kalshi_platform.inventory import audit
from kalshi_platform.inventory.audit import Check, moment
from kalshi_platform.inventory.evidence import SAME, Action, Fill, Market, Order, Report, between
from kalshi_platform.inventory.kinds import SETTLES_WITHIN, Kind
from kalshi_platform.inventory.semantics import YES_POSITIVE

ONSET = timedelta(seconds=10)
"""An order that ended within this time before a difference began may be its cause."""
NEAR = timedelta(minutes=2)
"""A fill within this time of the start of a difference may be its cause."""
AROUND = timedelta(seconds=30)
"""An action within this time before a break is mentioned."""

ENOUGH = 4
"""From this many fills on, a sum that equals a difference except for what is in transit is not a coincidence."""

_SHOWN_CHARACTERS = 160

Explained = tuple[Kind, str]


@dataclass(frozen=True)
class Case:
    """A break to explain."""

    check: Check
    market_ticker: str
    first: datetime
    last: datetime
    example: Mapping[str, Any]
    """The first finding's row."""
    clearest: Mapping[str, Any]
    """The first row among those with the least in transit: its amount is exact, if any is."""
    latest: Mapping[str, Any]
    """The last finding's row so far."""
    over: bool
    newest: datetime
    """The market's newest decision."""
    market: Market
    skew: timedelta | None
    """How far the engine's clock is ahead."""
    rolled: bool
    """Whether inv_before was rolled forward in this market."""
    stale_after_s: float

    @property
    def engine(self) -> str | None:
        """The engine of the latest finding; None if the check does not have it."""
        return self.latest.get("engine_instance_id")

    def at(self, row: Mapping[str, Any]) -> datetime:
        """Return the time of a finding's row; for a bucket, the end of its second."""
        at: datetime = row[self.check.at]
        return at if self.check.at == "ts" else at + timedelta(seconds=1)

    @property
    def brief(self) -> bool:
        """Whether it is short enough to be timing: it ended, or began, within SETTLES_WITHIN."""
        return (self.last if self.over else self.newest) - self.first <= SETTLES_WITHIN


def explain_all(cases: Sequence[Case]) -> list[Explained]:
    """Return the kind and the explanation of each case, in order."""
    diverged: dict[str, list[tuple[Case, Explained]]] = {}
    for case in cases:
        if case.check is audit.DIVERGENCE:
            diverged.setdefault(case.market_ticker, []).append((case, _divergence(case)))
    explained = []
    for case in cases:
        of_market = diverged.get(case.market_ticker, [])
        kind, text = _explain(case, of_market)
        explained.append((kind, f"{kind.capitalize()}: {text}; {_context(case)}."))
    return explained


def _explain(case: Case, diverged: Sequence[tuple[Case, Explained]]) -> Explained:
    row = case.latest
    if case.check is audit.DIVERGENCE:
        return next(explained for each, explained in diverged if each is case)
    if case.check is audit.DRIFT:
        return _drift(case, diverged)
    if case.check is audit.EXPOSURE:
        return _exposure(case)
    if case.check is audit.IDENTITY:
        return _identity(case)
    if case.check is audit.ROLLED:
        return Kind.ROLLED, (
            f"inv_before {number(row['inv_before'])} is the estimate of the decision before, while"
            f" {number(row['pos_filled'])} is filled"
        )
    return (
        Kind.STALE_SNAPSHOT,
        f"no snapshot of the exchange's position for {number(row['without_snapshot_s'])} s",
    )


# -- the filled position -------------------------------------------------------------------------


def _divergence(case: Case) -> Explained:
    row = case.latest
    held = row["pos_filled"]
    if not math.isfinite(held):
        return Kind.UNEXPLAINED, f"pos_filled is {held}, which is no number of contracts"
    settlement = case.market.settlement(case.last)
    if settlement is not None and abs(held) > SAME:
        result = f" ({settlement.result})" if settlement.result else ""
        return (
            Kind.SETTLED,
            f"settled at {moment(settlement.at)}{result}, and the engine still holds {number(held)}",
        )
    said = (
        f"the engine has {number(held)}, and the exchange's report {_when(row)} and the fills since say"
        f" {number(_accounted(row))}"
    )
    kind, why = (
        _sign(case)
        or _clock(case, "difference")
        or _rolled_position(case)
        or _cause(case, row, case.last)
        or _all_fills(case, row)
        or _cause(case, case.clearest, case.at(case.clearest))
        or _all_fills(case, case.clearest)
        or _cause(case, case.example, case.first)
        or _nothing_accounts(case)
    )
    return kind, f"{said}: {why}"


def _accounted(row: Mapping[str, Any]) -> float:
    """Return what pos_filled should be; the strict check has only the snapshot."""
    accounted: float = row.get("accounted_for", row["snapshot_pos_filled"])
    return accounted


def _sign(case: Case) -> Explained | None:
    """Explain a position with the wrong sign from the first finding on, or another convention."""
    rows = (case.latest, case.clearest, case.example)
    decision = case.market.decision(case.last, case.engine)
    convention = decision.convention if decision is not None else ""
    if all(
        abs(_accounted(row)) > SAME and abs(row["pos_filled"] + _accounted(row)) < SAME
        for row in rows
    ):
        return (
            Kind.WRONG_CONVENTION,
            f"it is the same with the other sign (inv_convention {convention or 'none'})",
        )
    if convention.lower() not in YES_POSITIVE:
        return Kind.WRONG_CONVENTION, f"inv_convention is {convention}"
    return None


def _nothing_accounts(case: Case) -> Explained:
    """Classify a difference that no report and no fill accounts for."""
    row = case.latest
    if case.rolled:
        return Kind.ROLLED, "inventory was rolled forward"
    if (row["snapshot_age_s"] or 0) > case.stale_after_s:
        return Kind.STALE_SNAPSHOT, "the report is too old to judge by"
    if case.over and case.brief and _came(case, -row["difference"]):
        lasted = (case.last - case.first).total_seconds()
        return Kind.TIMING, f"for {lasted:.1f} s only, until the engine had it, too"
    return Kind.UNEXPLAINED, f"{number(row['difference'])} apart"


def _when(row: Mapping[str, Any]) -> str:
    age = row["snapshot_age_s"]
    return f"{number(abs(age))} s {'before' if age >= 0 else 'after'}"


def _came(case: Case, by: float) -> bool:
    """Whether the engine's position moved by this amount when the break ended."""
    return any(
        abs(move.by - by) < SAME
        for move in between(case.market.moved, case.last, case.last + SETTLES_WITHIN)
    )


def _clock(case: Case, column: str) -> Explained | None:
    """Explain a difference by fills whose time is shifted by the engine's clock skew; `column` has the difference."""
    if case.skew is None:
        return None
    seconds = case.skew.total_seconds()
    reach = abs(case.skew) + timedelta(seconds=4)
    for row, at in ((case.latest, case.last), (case.example, case.first)):
        near = between(case.market.fills, at - reach, at + reach)
        if _adds_up([fill.amount for fill in near], row[column]):
            direction = "ahead" if seconds > 0 else "behind"
            learns = "late" if seconds > 0 else "early"
            return Kind.CLOCK, (
                f"the engine's clock is {abs(seconds):.0f} s {direction}, so that it seems to learn"
                f" {learns} of each fill"
            )
    return None


def _adds_up(amounts: Sequence[float], apart: float) -> bool:
    """Whether some consecutive amounts add up to a difference, of either sign."""
    sums = sorted(itertools.accumulate(amounts, initial=0.0))
    return any(
        bisect_right(sums, one + abs(apart) - SAME) < bisect_left(sums, one + abs(apart) + SAME)
        for one in sums
    )


def _rolled_position(case: Case) -> Explained | None:
    """Explain a pos_filled that follows the estimates and not the fills."""
    rolled = case.market.rolled
    times = len(rolled) - bisect_left(rolled, case.first - NEAR, key=attrgetter("at"))
    if times < 2:
        return None
    return Kind.ROLLED, (
        f"pos_filled was {times} times what the decision before expected it to become, with no fill"
    )


def _cause(case: Case, row: Mapping[str, Any], at: datetime) -> Explained | None:
    """Find what accounts for the amount of a difference."""
    apart = row["difference"]
    if not math.isfinite(apart):
        return None
    in_transit = row.get("in_transit", 0.0)
    found = _of_reports(case, apart, at, in_transit)
    # while a fill is in transit, one that is missing and one with the other sign look the same
    return found or (_of_fills(case, apart) if in_transit < SAME else None)


def _reported_at(beyond: tuple[datetime, Report, float]) -> datetime:
    return beyond[1].at


def _of_reports(case: Case, apart: float, at: datetime, in_transit: float) -> Explained | None:
    """Explain a difference by reports that the recorded fills do not account for."""
    market = case.market
    beyond = market.unrecorded
    until = at + timedelta(seconds=31)
    sofar = beyond[: bisect_right(beyond, until, key=_reported_at)]
    total = 0.0
    for count, (_, _, amount) in enumerate(reversed(sofar), 1):
        total += amount
        if _accounts(-total, apart, in_transit):
            explaining = sofar[len(sofar) - count :]
            return _never_filled(market, explaining) or (
                Kind.MISSING_FILL,
                f"fills of {number(total)} were never recorded",
            )
    for _, report, amount in beyond[bisect_right(beyond, at, key=_reported_at) :][:1]:
        if abs(amount - apart) < SAME:
            return (
                Kind.MISSING_FILL,
                f"fills of {number(apart)} were never recorded, as the report at"
                f" {moment(report.at)} confirms",
            )
    return None


def _never_filled(
    market: Market, beyond: Iterable[tuple[datetime, Any, float]]
) -> Explained | None:
    """Explain a difference by a recorded fill that the reports do not have, or have with the other sign.

    A fill on the public tape happened: the difference is then a trade of another program on the account.
    """
    for since, report, amount in beyond:
        for fill in between(market.fills, since - audit.REACHES, report.at + audit.REACHES):
            if abs(amount + fill.amount) < SAME and not market.tape.has(fill):
                also = (
                    ", nor has the public tape"
                    if market.tape.lacks(fill)
                    else " (or a trade that was never recorded undid it: the public tape does not say)"
                )
                return (
                    Kind.INVENTED_FILL,
                    f"fill {fill.fill_id} of {number(fill.amount)} was recorded, and the exchange"
                    f" does not have it{also}",
                )
            if not fill.worded and abs(amount + 2 * fill.amount) < SAME:
                return (
                    Kind.WRONG_CONVENTION,
                    f"fill {fill.fill_id} of {number(fill.amount)} was recorded with the other sign",
                )
    return None


def _of_fills(case: Case, apart: float) -> Explained | None:
    """Explain a difference by a recorded fill that was counted twice, with the other sign, or not at all.

    Among equal amounts, a fill near which pos_filled moved accordingly is preferred, then the closest. A fill
    with the other sign needs such a move: twice an amount occurs too often by coincidence.
    """
    fills = sorted(
        between(case.market.fills, case.first - NEAR, case.first + audit.REACHES),
        key=lambda fill: abs(fill.at - case.first),
    )
    ranked: list[tuple[int, Explained]] = []
    for fill in fills:
        named = f"fill {fill.fill_id} of {number(fill.amount)}"
        if abs(apart - fill.amount) < SAME:
            rank = _move_rank(case, fill, 2 * fill.amount)
            ranked.append((rank, (Kind.INVENTED_FILL, f"{named} was counted twice")))
        if abs(apart + fill.amount) < SAME:
            rank = 1 if _move_rank(case, fill, fill.amount) > 1 else 3
            ranked.append((rank, _uncounted(case, fill.amount, fill.at)))
        if abs(apart + 2 * fill.amount) < SAME:
            rank = _move_rank(case, fill, -fill.amount)
            if rank < 2:
                sentence = f"{named} was counted with the other sign"
                ranked.append((rank, (Kind.WRONG_CONVENTION, sentence)))
    if ranked:
        return min(ranked, key=itemgetter(0))[1]
    total = 0.0
    for fill in sorted(fills, key=lambda fill: fill.at, reverse=True):
        total += fill.amount
        if abs(apart + total) < SAME:
            return _uncounted(case, total, fill.at)
    reported = between(case.market.reports, case.first - ONSET, case.last)
    for move in between(case.market.moved, case.first - ONSET, case.first + ONSET):
        confirmed = reported and move.at + audit.REACHES < reported[-1].at
        if confirmed and abs(move.by - apart) < SAME:
            return (
                Kind.INVENTED_FILL,
                f"pos_filled moved by {number(move.by)} at {moment(move.at)}, and no fill accounts for it",
            )
    return None


def _move_rank(case: Case, fill: Fill, by: float) -> int:
    """Rank how well a move of pos_filled near a fill matches an amount: 0 in one or two steps, 1 together with
    other fills, 2 not at all, or because another fill of that amount is near.
    """
    begin, end = fill.at - audit.REACHES, fill.at + audit.REACHES
    others = [each.amount for each in between(case.market.fills, begin, end) if each is not fill]
    if any(abs(each - by) < SAME for each in others):
        return 2
    moves = [move.by for move in between(case.market.moved, begin, end)]
    steps = [*moves, *(one + two for one, two in itertools.pairwise(moves))]
    if any(abs(step - by) < SAME for step in steps):
        return 0
    beside = {sum(others), *others}
    return 1 if any(abs(step - by - amount) < SAME for step in steps for amount in beside) else 2


def _all_fills(case: Case, row: Mapping[str, Any]) -> Explained | None:
    """Explain a difference by all fills of one side since its start, counted with the other sign or not at all.

    The first of them is unknown: each fill around the start is tried, and earlier ones, because a small
    difference is not found at once.
    """
    apart, in_transit = row["difference"], row.get("in_transit", 0.0)
    begun = case.first - 2 * audit.REACHES
    since = between(case.market.fills, case.first - NEAR, case.at(row))
    for side, sense in (("YES", 1), ("NO", -1)):
        of_side = [fill for fill in since if fill.amount * sense > 0]
        total = sum(fill.amount for fill in of_side)
        for left, fill in zip(range(len(of_side), 0, -1), of_side, strict=True):
            if fill.at > case.first + audit.REACHES:
                break
            # a few fills that nearly add up, or earlier ones, may be a coincidence
            near = in_transit if left >= ENOUGH and fill.at >= begun else 0.0
            if left >= ENOUGH or fill.at >= begun:
                if _accounts(-2 * total, apart, near):
                    sentence = f"{side} fills of {number(total)} were counted with the other sign"
                    return Kind.WRONG_CONVENTION, sentence
                if abs(apart + total) < SAME:
                    return _uncounted(case, total, case.first)
            total -= fill.amount
    return None


def _uncounted(case: Case, amount: float, at: datetime) -> Explained:
    late = case.last - at
    if case.brief and (case.over or case.newest - at <= SETTLES_WITHIN):
        return Kind.TIMING, (
            f"fills of {number(amount)} came into pos_filled {late.total_seconds():.1f} s late"
            if case.over
            else f"fills of {number(amount)}, {late.total_seconds():.1f} s old, are not in it yet"
        )
    return Kind.MISSING_FILL, f"recorded fills of {number(amount)} are not in pos_filled"


# -- the estimated position ----------------------------------------------------------------------


def _drift(case: Case, diverged: Sequence[tuple[Case, Explained]]) -> Explained:
    row = case.latest
    if "unaccounted" not in row:
        return _strict_drift(case)
    total, apart = row["pos_total_est"], row["unaccounted"]
    if not math.isfinite(total):
        return Kind.UNEXPLAINED, f"pos_total_est is {total}, which is no number of contracts"
    kind, why = (
        _clock(case, "unaccounted")
        or _diverged(case, diverged)
        or _phantom(case, apart, row["in_transit"], case.at(row))
        or _phantom(
            case, case.clearest["unaccounted"], case.clearest["in_transit"], case.at(case.clearest)
        )
        or _uncounted_order(case, apart)
        or _beside_diverged(case, diverged)
        or _orphaned(case)
        or _beside(case, apart)
    )
    return kind, (
        f"the estimated position {number(total)} is {number(abs(apart))}"
        f" {'more' if apart > 0 else 'less'} than actions, answers and fills account for: {why}"
    )


def _diverged(case: Case, diverged: Sequence[tuple[Case, Explained]]) -> Explained | None:
    """Take the explanation of pos_filled, if that is off by the same amount at the time."""
    mine = [each["unaccounted"] for each in (case.latest, case.clearest, case.example)]
    for other, (kind, _) in _at_the_time(case, diverged):
        theirs = [each["difference"] for each in (other.latest, other.clearest, other.example)]
        if any(abs(one - two) < SAME for one in mine for two in theirs):
            return kind, "pos_filled is off by so much"
    return None


def _beside_diverged(case: Case, diverged: Sequence[tuple[Case, Explained]]) -> Explained | None:
    """Explain a drift by ended orders that are still counted, while pos_filled is off, too."""
    for other, _ in _at_the_time(case, diverged):
        for mine, theirs in (
            (case.latest, other.latest),
            (case.clearest, other.clearest),
            (case.example, other.example),
        ):
            rest = mine["unaccounted"] - theirs["difference"]
            found = _phantom(case, rest, mine["in_transit"], case.at(mine))
            if found is not None:
                off = number(theirs["difference"])
                return found[0], f"pos_filled is off by {off}, and {found[1]}"
    return None


def _at_the_time(
    case: Case, diverged: Sequence[tuple[Case, Explained]]
) -> list[tuple[Case, Explained]]:
    return [
        each
        for each in diverged
        if case.first <= each[0].last + NEAR and each[0].first - NEAR <= case.last
    ]


def _orphaned(case: Case) -> Explained | None:
    orphans = case.market.orphans(case.first - AROUND, case.last + timedelta(seconds=3))
    if not orphans:
        return None
    return Kind.UNKNOWN_ORDER, f"{orphans} answers to unrecorded actions came"


def _beside(case: Case, apart: float) -> Explained:
    """Classify a drift that no order and no fill accounts for at its time."""
    if case.over and case.brief and _late(case, apart):
        return Kind.TIMING, "an order of so much was counted moments beside its time"
    first = case.example["unaccounted"]
    if case.last > case.first and abs(apart) > 2 * abs(first):
        lasted = (case.last - case.first).total_seconds()
        return (
            Kind.UNEXPLAINED,
            f"it crept there from {number(first)} in {lasted:.0f} s, with no action for it",
        )
    return Kind.UNEXPLAINED, "no action was recorded for it"


def _strict_drift(case: Case) -> Explained:
    row = case.latest
    moved = number(max(row["moved_within"], row["moved_since"]))
    said = f"the estimated position moved by {moved} contracts with no action recorded"
    orphans = case.market.orphans(case.first - AROUND, case.last + timedelta(seconds=3))
    if orphans:
        return Kind.UNKNOWN_ORDER, f"{said}, yet {orphans} answers to unrecorded actions came"
    return Kind.UNEXPLAINED, said


def _phantom(case: Case, apart: float, in_transit: float, at: datetime) -> Explained | None:
    """Explain a difference at the time `at` by ended orders that are still counted."""
    begin, end = case.first - ONSET, case.first + timedelta(seconds=2)
    ended = [
        (order, order.ended_at)
        for order in sorted(
            between(case.market.ended, begin, at, at=attrgetter("ended_at")),
            key=attrgetter("began_at"),
        )
        if order.ended_at is not None
        and abs(order.remaining) > SAME
        and case.engine in {None, order.engine}
    ]
    for order, ended_at in ended:
        if ended_at <= end and abs(order.remaining - apart) < SAME:
            return Kind.PHANTOM_ORDER, (
                f"order {order.order_id} of {number(order.remaining)} was {_how(order)} at"
                f" {moment(ended_at)} and is still counted"
            )
    for how in sorted({order.how for order, _ in ended}):
        same_end = [
            order for order in ended if order[0].how == how and order[0].remaining * apart > 0
        ]
        same_end.sort(key=itemgetter(1), reverse=True)
        totals = itertools.accumulate(order.remaining for order, _ in same_end)
        for count, (total, (oldest, _)) in enumerate(zip(totals, same_end, strict=True), 1):
            if _accounts(total, apart, in_transit if count >= ENOUGH else 0.0):
                return Kind.PHANTOM_ORDER, (
                    f"the last {count} orders that were {_how(oldest)} are still counted"
                )
    return _filled_order(case, begin, end, apart, in_transit)


def _filled_order(
    case: Case, begin: datetime, end: datetime, apart: float, in_transit: float
) -> Explained | None:
    """Explain a difference by fills that were not subtracted from their orders, or that never happened."""
    market = case.market
    near = [
        fill
        for fill in between(market.fills, begin, end)
        # the check never counted an order that was not recorded
        if fill.order_id in market.order_ids and _accounts(fill.amount, apart, in_transit)
    ]
    for fill in near:
        named = f"fill {fill.fill_id} of {number(fill.amount)}"
        twin = _twin(market.fills, fill)
        if twin is not None:
            return Kind.INVENTED_FILL, f"{named} is recorded a second time as {twin.fill_id}"
        if market.tape.lacks(fill):
            return (
                Kind.INVENTED_FILL,
                f"{named} was recorded, and the public tape does not have it",
            )
    if not near:
        return None
    closest = min(near, key=lambda fill: abs(fill.amount - apart))
    return Kind.PHANTOM_ORDER, (
        f"order {closest.order_id} was filled by {number(closest.amount)} at {moment(closest.at)} and is"
        " still counted whole"
    )


def _accounts(amount: float, apart: float, in_transit: float) -> bool:
    """Whether an amount equals the difference, or exceeds it by at most what is in transit."""
    return amount * apart > 0 and abs(apart) - SAME < abs(amount) < abs(apart) + in_transit + SAME


def _twin(fills: Sequence[Fill], fill: Fill) -> Fill | None:
    second = timedelta(seconds=1)
    return next(
        (
            each
            for each in between(fills, fill.at - second, fill.at + second)
            if each is not fill
            and each.order_id == fill.order_id
            and abs(each.amount - fill.amount) < SAME
        ),
        None,
    )


def _how(order: Order) -> str:
    return {"not found": "no longer found", "filled": "executed"}.get(order.how, order.how)


def _uncounted_order(case: Case, apart: float) -> Explained | None:
    """Explain a drift by resting orders that are not counted."""
    resting = [
        order
        for order in case.market.resting
        if order.began_at <= case.last and case.engine in {None, order.engine}
    ]
    for order in resting:
        if abs(order.remaining + apart) < SAME:
            return (
                Kind.UNKNOWN_ORDER,
                f"order {order.order_id} of {number(order.remaining)} rests and is not counted",
            )
    if len(resting) > 1 and abs(sum(order.remaining for order in resting) + apart) < SAME:
        return Kind.UNKNOWN_ORDER, f"{len(resting)} orders rest and are not counted"
    return None


def _late(case: Case, apart: float) -> bool:
    """Whether an order of this amount was sent or ended so close in time that the engine counted it early or late."""
    begin, end = case.first - SETTLES_WITHIN, case.first + SETTLES_WITHIN
    began = between(case.market.orders, begin, end, at=attrgetter("began_at"))
    ended = between(case.market.ended, begin, end, at=attrgetter("ended_at"))
    return any(abs(abs(order.remaining) - abs(apart)) < SAME for order in (*began, *ended))


def _exposure(case: Case) -> Explained:
    exposure = case.latest["pos_open_exposure"]
    if not math.isfinite(exposure):
        return Kind.UNEXPLAINED, f"pos_open_exposure is {exposure}, which is no number of contracts"
    found = _phantom(case, exposure, 0.0, case.last)
    said = (
        f"the engine counts {number(exposure)} contracts of exposure although it has no open order"
    )
    if found is not None and found[0] is Kind.PHANTOM_ORDER:
        return found[0], f"{said}: {found[1]}"
    return Kind.UNKNOWN_ORDER, said


def _identity(case: Case) -> Explained:
    row = case.latest
    total, filled, exposure = (
        row["pos_total_est"],
        row["pos_filled"],
        row["pos_open_exposure"],
    )
    strange = [
        f"{name} is {row[name]}"
        for name in ("pos_filled", "pos_open_exposure", "pos_total_est")
        if not math.isfinite(row[name])
    ]
    if strange:
        return Kind.UNEXPLAINED, f"{', '.join(strange)}: no number of contracts"
    if abs(total - filled - exposure) < SAME:
        return Kind.UNKNOWN_ORDER, (
            f"pos_open_exposure is {number(exposure)}, and the resting sizes add up to"
            f" {number(row['resting'])}"
        )
    said = (
        f"pos_total_est {number(total)} is not pos_filled {number(filled)} plus pos_open_exposure"
        f" {number(exposure)}"
    )
    if abs(total - filled - row["resting"]) < SAME:
        return Kind.UNKNOWN_ORDER, f"{said}, but it is with the {number(row['resting'])} that rest"
    return (Kind.ROLLED if case.rolled else Kind.UNEXPLAINED), said


# -- the end of each sentence --------------------------------------------------------------------


def _context(case: Case) -> str:
    """Describe what was blocked, requested and refused at the time, as the end of a sentence."""
    market = case.market
    decision = market.decision(case.first, case.example.get("engine_instance_id"))
    codes = ", ".join(decision.block_codes) if decision is not None else ""
    parts = [f"block_codes were {codes}" if codes else "nothing was blocked"]
    begin, end = case.first - AROUND, case.first + timedelta(seconds=2)
    actions = between(market.actions, begin, end)
    parts.append(
        f"the last action was {_asked(actions[-1])}" if actions else "no action was recorded"
    )
    refused = [answer for answer in between(market.answers, begin, end) if answer.reason]
    if refused:
        parts.append(f"order {refused[-1].order_id} was rejected: {shortened(refused[-1].reason)}")
    return "; ".join(parts)


def _asked(action: Action) -> str:
    what = f"{action.kind} {action.side} of {number(action.size)} {action.contract}".rstrip()
    return f"{what} at {number(action.price)} {shortened(action.request)}".rstrip()


def number(value: float) -> str:
    """Format a number with at most six decimals, without trailing zeros."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def shortened(text: str) -> str:
    """Return text of an engine or the exchange on one line, shortened."""
    one_line = " ".join(str(text).split())
    return one_line if len(one_line) <= _SHOWN_CHARACTERS else f"{one_line[:_SHOWN_CHARACTERS]}…"
