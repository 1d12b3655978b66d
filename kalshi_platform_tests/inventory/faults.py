"""Engines and accounts that go wrong in one way, on top of trading that is healthy: what is planted, what the
audit has to say of it, and what it must not say.

Each fault begins at `SINCE`. It is looked at three times, as the five-minute schedule of the platform would:
twenty seconds and three minutes after it began, and at the end. The expected kinds are those that an honest
reader of the tables can give; where there is more than one, the table names each.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kalshi_platform.clickhouse.client import Client
from kalshi_platform.inventory import audit, breaks
from kalshi_platform.inventory.audit import Parameters
from kalshi_platform.inventory.breaks import Break
from kalshi_platform_tests.inventory.scenarios import (
    MINUTE,
    SECOND,
    Engine,
    Fill,
    Market,
    Options,
    Order,
    Row,
    Word,
    insert,
)

SINCE = 8 * MINUTE
LOOKS = (SINCE + 20 * SECOND, SINCE + 3 * MINUTE, 21 * MINUTE)
"""When the audit looks, in true time."""

TIMING = "timing"
MISSING = "missing fill"
INVENTED = "invented fill"
UNKNOWN = "unknown order"
PHANTOM = "phantom order"
ROLLED = "rolled inventory"
CONVENTION = "wrong convention"
SETTLED = "settled"
CLOCK = "clock"
STALE = "stale snapshot"
UNEXPLAINED = "unexplained"

NAN = float("nan")


def adds(row: Row, *, filled: float = 0.0, exposure: float = 0.0, total: float = 0.0) -> None:
    """Change a decision's position columns, its total with them."""
    row["pos_filled"] += filled
    row["inv_before"] += filled
    row["inv_after_est"] += filled
    row["pos_open_exposure"] += exposure
    row["pos_total_est"] += filled + exposure + total


class Faulty(Engine):
    """An engine that is right until `SINCE`."""

    def __init__(self, market: Market, name: str, options: Options, amount: int) -> None:
        super().__init__(market, name, options)
        self.amount = amount
        self.sign = self.rng.choice((1, -1))
        self.dead: Order | None = None
        self.plants()

    @property
    def moved(self) -> float:
        """The amount in contracts, with the fault's sign."""
        return self.sign * self.amount / 100

    def plants(self) -> None:
        """Ask the exchange for what the fault needs."""

    def own(self) -> list[Order]:
        """Its resting orders of the fault's sign."""
        return [order for order in self.market.resting(self.sign) if order.engine is self]

    def plants_fill(self, at: int = SINCE) -> None:
        self.market.at(at, self.market.plant_fill, self, self.sign, self.amount)


# -- fills -------------------------------------------------------------------------------------


class MissesFill(Faulty):
    loses_remainder = True

    def plants(self) -> None:
        self.plants_fill()

    def hears_fill(self, t: int, fill: Fill) -> None:
        if not fill.planted:
            super().hears_fill(t, fill)


class RecordsOnly(MissesFill):
    """The fill is written down and not counted."""

    def hears_fill(self, t: int, fill: Fill) -> None:
        if fill.planted:
            self.records_fill(t, fill)
        super().hears_fill(t, fill)


class BooksTwice(MissesFill):
    """The same fill is heard twice and written twice."""

    def hears_fill(self, t: int, fill: Fill) -> None:
        Faulty.hears_fill(self, t, fill)
        if fill.planted:
            self.again(t + 3, fill)

    def again(self, t: int, fill: Fill) -> None:
        self.records_fill(t, fill)
        self.books(t, fill)


class AddsTwice(BooksTwice):
    """Written once, counted twice."""

    def again(self, t: int, fill: Fill) -> None:
        self.books(t, fill)


class BooksUnderTwoNames(BooksTwice):
    """Heard from the WebSocket and from the fills' page, and taken for two."""

    def again(self, t: int, fill: Fill) -> None:
        self.records_fill(t, fill, fill_id=f"{fill.fill_id}-rest")
        self.books(t, fill)


class Invents(Faulty):
    """A fill that the exchange never made."""

    loses_remainder = True
    fill_id = ""

    def plants(self) -> None:
        self.market.at(SINCE, self.invents)

    def invents(self, t: int) -> None:
        for order in self.own():
            if order.seen > self.amount and not order.leaving:
                name = self.fill_id or self.market.name("f")
                fill = Fill(name, t, order, self.sign * self.amount, whole=False)
                self.hears_fill(t, fill)
                return
        self.market.at(t + 150, self.invents)


class FlipsSign(MissesFill):
    """One fill is counted with the other sign; its row is right."""

    def hears_fill(self, t: int, fill: Fill) -> None:
        Faulty.hears_fill(self, t, fill)
        if fill.planted:
            self.position -= 2 * fill.signed


class FlipsRow(FlipsSign):
    """The row has the other side too; only the exchange's own words beside it are right."""

    def records_fill(self, t: int, fill: Fill, **others: Any) -> None:
        side = {"side": "no" if fill.signed > 0 else "yes"} if fill.planted else {}
        super().records_fill(t, fill, **side, **others)


class BooksNoAsYes(Faulty):
    """From then on every NO fill is booked as a YES fill, in its row too."""

    def books(self, t: int, fill: Fill) -> None:
        self.position += abs(fill.signed) if t >= SINCE else fill.signed

    def records_fill(self, t: int, fill: Fill, **others: Any) -> None:
        super().records_fill(t, fill, **({"side": "yes"} if t >= SINCE else {}), **others)


class OtherSign(Faulty):
    """The whole position is kept with the other sign."""

    def tampers(self, t: int, row: Row) -> None:
        if t >= SINCE:
            adds(row, filled=-2 * row["pos_filled"])
            row["inv_convention"] = "no_positive"


class NetsNothing(Faulty):
    """A fill that closes a position is written down and changes nothing."""

    def books(self, t: int, fill: Fill) -> None:
        if t < SINCE or fill.signed * self.position >= 0:
            super().books(t, fill)


class NetsUp(Faulty):
    """A fill that closes a position is added to it."""

    def books(self, t: int, fill: Fill) -> None:
        against = t >= SINCE and fill.signed * self.position < 0
        self.position += -fill.signed if against else fill.signed


class LosesFractions(Faulty):
    """Fills are counted in whole contracts; their rows are right."""

    def books(self, t: int, fill: Fill) -> None:
        whole = int(fill.signed / 100) * 100
        self.position += whole if t >= SINCE else fill.signed


class LosesFractionsInRows(LosesFractions):
    def records_fill(self, t: int, fill: Fill, **others: Any) -> None:
        size = abs(fill.signed) // 100
        if t < SINCE:
            super().records_fill(t, fill, **others)
        elif size:
            super().records_fill(t, fill, size=float(size), **others)


class RacesRight(Faulty):
    """A fill gets in before a cancel: the engine hears both, and books both."""

    raced = False

    def plants(self) -> None:
        self.market.at(SINCE, self.races)

    def races(self, t: int) -> None:
        for order in self.own():
            if order.remaining > self.amount and not order.leaving:
                self.cancels(t, order)
                return
        self.market.at(t + 150, self.races)

    def cancels(self, t: int, order: Order) -> None:
        super().cancels(t, order)
        fits = order.remaining > self.amount and order.sign == self.sign
        if t >= SINCE and fits and not self.raced:
            self.raced = True
            self.market.fill(t + 2, order, self.amount, planted=True)


class RacesWrong(RacesRight):
    """It drops the fill, since the order is leaving."""

    loses_remainder = True

    def hears_fill(self, t: int, fill: Fill) -> None:
        if not fill.planted:
            super().hears_fill(t, fill)


# -- orders ------------------------------------------------------------------------------------


class GhostExposure(Faulty):
    """Exposure with no order at all."""

    def plants(self) -> None:
        self.market.at(SINCE, self.withdraws)

    def withdraws(self, t: int) -> None:
        self.quoting = False
        for order in list(self.live.values()):
            self.cancels(t + 1, order)

    def tampers(self, t: int, row: Row) -> None:
        if t >= SINCE + 5 * SECOND and not self.live:
            adds(row, exposure=self.moved)


class GhostOrder(Faulty):
    """An order that was never sent is counted, consistently in every column."""

    def tampers(self, t: int, row: Row) -> None:
        if t >= SINCE:
            adds(row, exposure=self.moved)
            row["open_orders_count"] += 1
            row["open_yes_bid_size" if self.sign > 0 else "open_yes_ask_size"] += self.amount / 100


class Creeps(Faulty):
    """Exposure grows by the amount in each second."""

    def tampers(self, t: int, row: Row) -> None:
        if t >= SINCE:
            crept = self.moved * min((t - SINCE) / SECOND, 60)
            adds(row, exposure=crept)
            row["open_yes_bid_size" if self.sign > 0 else "open_yes_ask_size"] += abs(crept)


class CountsCanceled(Faulty):
    """The exchange ends an order by itself; the engine writes that down and goes on counting it."""

    status = "canceled"

    def plants(self) -> None:
        self.market.at(SINCE, self.ends)

    def ends(self, t: int) -> None:
        for order in self.own():
            if not order.leaving and order.seen == order.remaining >= self.amount:
                self.dead = order
                order.forgotten = True
                self.market.ends(t, order, self.status)
                return
        self.sign = -self.sign  # it may not quote that side now
        self.market.at(t + 150, self.ends)

    def hears_end(self, t: int, word: Word) -> None:
        if word.order is self.dead:
            self.records_word(t, word)
        else:
            super().hears_end(t, word)


class CountsExpired(CountsCanceled):
    status = "expired"


class CountsNotFound(CountsCanceled):
    """The word of its end is lost; a cancel is refused, and the order still counted."""

    def ends(self, t: int) -> None:
        for order in self.own():
            if not order.leaving and order.seen == order.remaining >= self.amount:
                order.remaining = 0
                self.dead = order
                return
        self.sign = -self.sign
        self.market.at(t + 150, self.ends)

    def hears_rejected(self, t: int, word: Word) -> None:
        super().hears_rejected(t, word)
        if word.order is self.dead or word.order.replaces is self.dead:
            word.order.forgotten = True


class CountsAckedCancel(CountsCanceled):
    """Our own cancel is acknowledged, and the order still counted."""

    def ends(self, t: int) -> None:
        for order in self.own():
            if not order.leaving and order.seen == order.remaining >= self.amount:
                self.dead = order
                order.forgotten = True
                self.cancels(t, order)
                return
        self.sign = -self.sign
        self.market.at(t + 150, self.ends)


class KeepsRemaining(MissesFill):
    """A fill is booked, and the order counted as if it had not been filled."""

    loses_remainder = False

    def hears_fill(self, t: int, fill: Fill) -> None:
        Faulty.hears_fill(self, t, fill)

    def reduces(self, t: int, fill: Fill) -> None:
        if not fill.planted:
            super().reduces(t, fill)


class Jumps(Faulty):
    """Exposure jumps a second after an action that has nothing to do with it, and stays."""

    jumped = False

    def ripe(self, t: int) -> bool:
        return 500 <= t - self.last_action <= 1500

    def tampers(self, t: int, row: Row) -> None:
        self.jumped = self.jumped or (t >= SINCE and self.ripe(t))
        if self.jumped:
            adds(row, exposure=self.moved)
            row["open_yes_bid_size" if self.sign > 0 else "open_yes_ask_size"] += self.amount / 100


class JumpsAlone(Jumps):
    """No action of this market for five seconds; another market of the engine has many."""

    def ripe(self, t: int) -> bool:
        return t - self.last_action > 5 * SECOND


class RejectStorm(Faulty):
    """Every order is refused for a minute; the engine counts none of them."""

    def plants(self) -> None:
        self.market.at(SINCE, self.storms, True)
        self.market.at(SINCE + MINUTE, self.storms, False)

    def storms(self, t: int, rejecting: bool) -> None:
        self.market.rejecting = rejecting
        for order in self.market.resting():
            if rejecting and not order.leaving:
                self.cancels(t, order)


class CountsRejected(RejectStorm):
    """It goes on counting the refused orders of the side that it may quote."""

    def storms(self, t: int, rejecting: bool) -> None:
        if rejecting:
            self.sign = -1 if self.position > 0 else 1
        super().storms(t, rejecting)

    def hears_rejected(self, t: int, word: Word) -> None:
        if word.asked == "place" and word.order.sign == self.sign and t >= SINCE:
            word.order.forgotten = True
            self.records_word(t, word)
        else:
            super().hears_rejected(t, word)


class SlowAnswers(Faulty):
    """Cancels are acknowledged after the amount in seconds; orders are counted meanwhile."""

    def cancels(self, t: int, order: Order) -> None:
        slow = self.amount * 10
        ack = (slow, slow + 500) if SINCE <= t < SINCE + MINUTE else self.options.cancel_ack
        right, self.options = self.options, replace(self.options, cancel_ack=ack)
        super().cancels(t, order)
        self.options = right


# -- positions ---------------------------------------------------------------------------------


class RollsBefore(Faulty):
    """inv_before is the last estimate."""

    last: float | None = None

    def tampers(self, t: int, row: Row) -> None:
        change = row["inv_after_est"] - row["inv_before"] + self.moved
        if t >= SINCE:
            row["inv_before"] = row["inv_before"] if self.last is None else self.last
            row["inv_after_est"] = self.last = row["inv_before"] + change


class RollsFilled(Faulty):
    """pos_filled itself is the last estimate."""

    apart = 0.0

    def tampers(self, t: int, row: Row) -> None:
        change = row["inv_after_est"] - row["inv_before"]
        adds(row, filled=self.apart)
        if t >= SINCE:
            self.apart += change


class OtherBot(Faulty):
    """Another bot, which records nothing, trades on the account, again and again."""

    times = 5

    def plants(self) -> None:
        for n in range(self.times):
            self.market.at(SINCE + n * 20 * SECOND, self.trades)

    def trades(self, t: int) -> None:
        self.market.position += self.sign * self.amount
        self.market.prints(t, self.market.name("t"), self.sign * self.amount)


class AppTrade(OtherBot):
    """A trade by hand; the engine takes the new position over ten seconds later."""

    times = 1

    def trades(self, t: int) -> None:
        super().trades(t)
        self.market.at(t + 10 * SECOND, self.adopts)

    def adopts(self, t: int) -> None:
        self.position += self.sign * self.amount


class HoldsOn(Faulty):
    """The market settles, and the engine goes on holding."""

    def hears_settlement(self, t: int) -> None:
        """It does not listen."""


class Restarts(Faulty):
    """A restart from a state that is older than the last fill."""

    renamed = True

    def plants(self) -> None:
        self.plants_fill(SINCE - 20 * SECOND)

    def hears_fill(self, t: int, fill: Fill) -> None:
        super().hears_fill(t, fill)
        if fill.planted:
            self.market.at(max(t + 5 * SECOND, SINCE), self.restarts, fill)

    def restarts(self, t: int, fill: Fill) -> None:
        for order in self.market.resting():
            self.market.ends(t, order)
        self.position -= fill.signed
        self.live.clear()
        if self.renamed:
            self.name += "-again"


class RestartsInPlace(Restarts):
    renamed = False


class WritesNan(Faulty):
    """NaN in pos_filled alone, for a minute."""

    columns: Sequence[str] = ("pos_filled",)
    value = NAN

    def tampers(self, t: int, row: Row) -> None:
        if SINCE <= t < SINCE + MINUTE:
            row.update(dict.fromkeys(self.columns, self.value))


class WritesInfinity(WritesNan):
    value = math.inf


class WritesInfiniteExposure(WritesNan):
    columns = ("pos_open_exposure", "pos_total_est")
    value = -math.inf


class WritesNothingKnown(WritesNan):
    columns = ("pos_filled", "pos_open_exposure", "pos_total_est")


class WrongTotal(Faulty):
    def tampers(self, t: int, row: Row) -> None:
        if t >= SINCE:
            adds(row, total=self.moved)


class WrongSizes(Faulty):
    """The resting sizes do not add up to the exposure."""

    def tampers(self, t: int, row: Row) -> None:
        if t >= SINCE:
            row["open_yes_bid_size"] += self.amount / 100


class NoSnapshots(Faulty):
    """The collector stops."""

    def plants(self) -> None:
        self.market.at(SINCE, self.stops)

    def stops(self, t: int) -> None:
        self.market.collecting = False


class Right(Faulty):
    """Does nothing wrong; what is wrong is in its options."""


# -- the table ---------------------------------------------------------------------------------

_SIZES = (60, 300, 1250)
_PLAIN = Options(minutes=14.0)
_UNTRUE = {
    "settled": re.compile(r"settled at", re.IGNORECASE),
    "clock": re.compile(r"clock is", re.IGNORECASE),
    "never recorded": re.compile(r"never recorded", re.IGNORECASE),
}


@dataclass(frozen=True)
class Fault:
    """What is planted, and what the audit has to say of it."""

    name: str
    engine: type[Faulty]
    kinds: frozenset[str]
    """Any of these is right; none: nothing is wrong, and nothing may stay open."""
    sizes: Sequence[int] = _SIZES
    says: Sequence[str] = ()
    """Patterns that a sentence of the right kind has; {size} is the amount."""
    never_says: Sequence[str] = ("settled", "clock")
    """Of `_UNTRUE`: what no sentence of the market may have."""
    also: frozenset[str] = frozenset()
    """Kinds that other findings of the market may honestly have beside it."""
    by_look: int = 1
    """The first look at which it must be found and named: the second, or the last."""
    options: Options = _PLAIN
    companion: type[Faulty] | None = None
    """An engine of another market under the same name."""

    def cases(self) -> Iterable[Case]:
        """One for each size; snapshots come every 30 s and every 5 minutes in turn."""
        for n, size in enumerate(self.sizes):
            yield Case(self, size, (30 * SECOND, 5 * MINUTE)[n % 2])


def _any(*kinds: str) -> frozenset[str]:
    return frozenset(kinds)


_PHANTOM = _any(PHANTOM, UNKNOWN)
_GHOST = _any(PHANTOM, UNKNOWN, UNEXPLAINED)
_OUTSIDE = _any(MISSING, UNEXPLAINED)
_HELD = Options(minutes=14.0, begins_with=2600, taker_every=20 * SECOND)
_SETTLES = replace(_HELD, settles_at=SINCE, taker_every=60 * SECOND)
_BUSY = Options(minutes=14.0, taker_every=5 * SECOND)
_WHOLE = Options(minutes=14.0, whole=True)
_WHOLE_SIZES = (200, 400, 600)
"""Twice the amounts of many honest fills beside them."""
_UNTAPED = replace(_WHOLE, taped=False)
_EITHER = _any(MISSING, INVENTED)
"""A fill missed, or one the other way invented: among equal amounts only the public tape decides. That one was
recorded with the other sign the tables do: its raw_json has the exchange's own word.
"""
_LOOK_ALIKE = (r"the public tape does not say|never recorded",)
_SIZE = (r"{size}\b",)

FAULTS: Sequence[Fault] = (
    Fault("fill missed", MissesFill, _any(MISSING), says=_SIZE),
    Fault("fill recorded, not counted", RecordsOnly, _any(MISSING), says=_SIZE, never_says=("settled", "clock", "never recorded")),
    Fault("fill recorded and counted twice", BooksTwice, _any(INVENTED), says=_SIZE, never_says=("settled", "clock", "never recorded")),
    Fault("fill counted twice", AddsTwice, _any(INVENTED), says=_SIZE, never_says=("settled", "clock", "never recorded")),
    Fault("fill booked under two names", BooksUnderTwoNames, _any(INVENTED), says=_SIZE, also=_PHANTOM, never_says=("settled", "clock", "never recorded")),
    Fault("fill invented", Invents, _any(INVENTED), says=_SIZE, also=_PHANTOM, never_says=("settled", "clock", "never recorded")),
    Fault("fill missed, whole contracts", MissesFill, _any(MISSING), sizes=_WHOLE_SIZES, also=_PHANTOM, options=_WHOLE),
    Fault("fill missed, whole contracts, no tape", MissesFill, _EITHER, sizes=_WHOLE_SIZES, says=_LOOK_ALIKE, also=_PHANTOM, options=_UNTAPED),
    Fault("fill counted twice, whole contracts", AddsTwice, _any(INVENTED), sizes=_WHOLE_SIZES, says=_SIZE, never_says=("settled", "clock", "never recorded"), options=_WHOLE),
    Fault("fill invented, whole contracts", Invents, _any(INVENTED), sizes=_WHOLE_SIZES, also=_PHANTOM, options=_WHOLE),
    Fault("fill invented, whole contracts, no tape", Invents, _EITHER, sizes=_WHOLE_SIZES, says=_LOOK_ALIKE, also=_PHANTOM, options=_UNTAPED),
    Fault("sign flipped once", FlipsSign, _any(CONVENTION, UNEXPLAINED), also=_GHOST),
    Fault("sign flipped once, row too", FlipsRow, _any(CONVENTION, INVENTED), also=_GHOST, never_says=("settled", "clock", "never recorded")),
    Fault("NO fills booked as YES", BooksNoAsYes, _any(CONVENTION), sizes=(100, 200), options=_BUSY, also=_any(*_GHOST, INVENTED), never_says=("settled", "clock", "never recorded")),
    Fault("position kept with the other sign", OtherSign, _any(CONVENTION), sizes=(100, 200), options=_HELD, also=_GHOST),
    Fault("wrong market, where it was filled", MissesFill, _any(MISSING), says=_SIZE, companion=Right),
    Fault("wrong market, where it was booked", Invents, _any(INVENTED), says=_SIZE, companion=MissesFill, also=_PHANTOM, never_says=("settled", "clock", "never recorded")),
    Fault("netting left out", NetsNothing, _any(MISSING, CONVENTION, UNEXPLAINED), sizes=(100, 200), options=replace(_HELD, taker_every=6 * SECOND), also=_GHOST, never_says=("settled", "clock", "never recorded")),
    Fault("netting added up", NetsUp, _any(CONVENTION, UNEXPLAINED), sizes=(100, 200), options=replace(_HELD, taker_every=6 * SECOND), also=_any(*_GHOST, INVENTED)),
    Fault("fractions lost", LosesFractions, _any(MISSING, UNEXPLAINED), sizes=(100, 200), options=_BUSY, by_look=2, also=_GHOST),
    Fault("fractions lost, rows too", LosesFractionsInRows, _any(MISSING, INVENTED, UNEXPLAINED), sizes=(100, 200), options=_BUSY, by_look=2, also=_GHOST),
    Fault("cancel races with a fill", RacesRight, _any()),
    Fault("cancel races with a fill, which is dropped", RacesWrong, _any(MISSING), says=_SIZE),
    Fault("exposure without an order", GhostExposure, _PHANTOM, sizes=(2, 300, 5000), also=_any(UNEXPLAINED)),
    Fault("order counted that was never sent", GhostOrder, _GHOST, sizes=(100, 500, 4000)),
    Fault("exposure creeps by the second", Creeps, _GHOST, sizes=(50, 90)),
    Fault("canceled by the exchange, still counted", CountsCanceled, _any(PHANTOM), sizes=(150, 500, 2000), also=_any(UNKNOWN)),
    Fault("expired, still counted", CountsExpired, _any(PHANTOM), sizes=(150, 500, 2000), also=_any(UNKNOWN)),
    Fault("cancel refused as not found, still counted", CountsNotFound, _PHANTOM, sizes=(500, 2000)),
    Fault("cancel acknowledged, still counted", CountsAckedCancel, _any(PHANTOM), sizes=(150, 500, 2000), also=_any(UNKNOWN)),
    Fault("filled, still counted", KeepsRemaining, _PHANTOM, sizes=(150, 500, 1250), also=_any(UNEXPLAINED)),
    Fault("drift a second after another action", Jumps, _GHOST, sizes=(300, 5000)),
    Fault("drift beside an action in another market", JumpsAlone, _GHOST, sizes=(300, 5000), companion=Right),
    Fault("orders refused for a minute", RejectStorm, _any(), sizes=(100,)),
    Fault("refused orders still counted", CountsRejected, _any(PHANTOM), sizes=(100, 200), also=_any(UNKNOWN, UNEXPLAINED)),
    Fault("answers late by seconds", SlowAnswers, _any(), sizes=(300, 1000, 2500)),
    Fault("inv_before rolled forward", RollsBefore, _any(ROLLED), sizes=(0, 100)),
    Fault("pos_filled rolled forward", RollsFilled, _any(ROLLED), sizes=(100, 200), also=_GHOST),
    Fault("another bot trades on the account", OtherBot, _OUTSIDE),
    Fault("another bot trades, whole contracts", OtherBot, _OUTSIDE, sizes=_WHOLE_SIZES, options=_WHOLE),
    Fault("another bot trades, whole contracts, no tape", OtherBot, _any(*_OUTSIDE, INVENTED), sizes=_WHOLE_SIZES, says=_LOOK_ALIKE, options=_UNTAPED),
    Fault("trade by hand, taken over later", AppTrade, _OUTSIDE, sizes=(300, 1250, 5000)),
    Fault("settled, still held", HoldsOn, _any(SETTLED), sizes=(100,), options=_SETTLES, says=(r"settled at",), never_says=("clock", "never recorded")),
    Fault("settled at nothing, still held", HoldsOn, _any(SETTLED), sizes=(100,), options=replace(_SETTLES, result="no", begins_with=-1475), says=(r"settled at",), never_says=("clock", "never recorded")),
    Fault("void, still held", HoldsOn, _any(SETTLED), sizes=(100,), options=replace(_SETTLES, result="void"), says=(r"settled at|void",), never_says=("clock", "never recorded")),
    Fault("settled, followed", Right, _any(), sizes=(100,), options=_SETTLES),
    Fault("restart with an old state", Restarts, _OUTSIDE, says=_SIZE, also=_GHOST),
    Fault("restart in place with an old state", RestartsInPlace, _OUTSIDE, says=_SIZE, also=_GHOST),
    Fault("clock 5 s ahead", Right, _any(CLOCK), sizes=(100, 200), options=Options(minutes=14.0, skew_ms=5000, taker_every=6000), says=(r"clock", r"ahead", r"\b[456](\.\d+)? s"), never_says=("settled", "never recorded"), by_look=2),
    Fault("clock 5 s behind", Right, _any(CLOCK), sizes=(100, 200), options=Options(minutes=14.0, skew_ms=-5000, taker_every=6000), says=(r"clock", r"behind", r"\b[456](\.\d+)? s"), never_says=("settled", "never recorded"), by_look=2),
    Fault("clock 5 s ahead, fills by it", Right, _any(CLOCK), sizes=(100, 200), options=Options(minutes=14.0, skew_ms=5000, taker_every=6000, fills_at="engine"), says=(r"clock", r"ahead", r"\b[456](\.\d+)? s"), never_says=("settled", "never recorded"), by_look=2),
    Fault("clock 5 s behind, fills by it", Right, _any(CLOCK), sizes=(100, 200), options=Options(minutes=14.0, skew_ms=-5000, taker_every=6000, fills_at="engine"), says=(r"clock", r"behind", r"\b[456](\.\d+)? s"), never_says=("settled", "never recorded"), by_look=2),
    Fault("no snapshots any more", NoSnapshots, _any(STALE), sizes=(100, 200), by_look=2, options=Options(minutes=21.0)),
    Fault("pos_filled is NaN", WritesNan, _any(UNEXPLAINED), sizes=(100,)),
    Fault("pos_filled is infinite", WritesInfinity, _any(UNEXPLAINED), sizes=(100,)),
    Fault("exposure is infinite", WritesInfiniteExposure, _any(UNEXPLAINED, *_PHANTOM), sizes=(100,)),
    Fault("no position known any more", WritesNothingKnown, _any(UNEXPLAINED), sizes=(100,)),
    Fault("total is not the sum", WrongTotal, _any(UNEXPLAINED, UNKNOWN, PHANTOM), sizes=(2, 300, 1250)),
    Fault("resting sizes contradict the exposure", WrongSizes, _GHOST, sizes=(100, 1250)),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A fault of one size."""

    fault: Fault
    size: int
    snapshot_every: int

    @property
    def name(self) -> str:
        return f"{self.fault.name}, {self.size / 100:g}"

    @property
    def ticker(self) -> str:
        return "KXFAULT-" + re.sub(r"\W+", "-", self.name).upper()

    def plant(self, start_ms: int, seed: int = 1) -> list[Market]:
        """The market that goes wrong first, and its companion's."""
        fault = self.fault
        options = replace(fault.options, snapshot_every=self.snapshot_every)
        if options.quote_sizes == Options.quote_sizes:
            options = replace(options, quote_sizes=self._quotes())
        name = f"engine-{self.ticker.lower()}-{seed}"
        others = []
        if fault.companion is not None:
            busy = replace(options, price_every=1500)
            other = Market(f"{self.ticker}-OTHER-{seed}", seed, start_ms, busy)
            fault.companion(other, name, busy, self.size)
            others.append(other.run())
        market = Market(f"{self.ticker}-{seed}", seed, start_ms, options)
        engine = fault.engine(market, name, options, self.size)
        planted = [fill.fill_id for other in others for fill in other.fills if fill.planted]
        if planted and isinstance(engine, Invents):
            engine.fill_id = planted[0]
        return [market.run(), *others]

    def _quotes(self) -> tuple[int, int]:
        """Orders large enough for a fill of the size; those that are counted too long have it."""
        if issubclass(self.fault.engine, CountsCanceled):
            return self.size, self.size + 40
        needs_fill = issubclass(self.fault.engine, MissesFill | Invents | RacesRight | Restarts)
        return (self.size + 100, self.size + 1000) if needs_fill else (300, 1200)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with what the audit said of a case; nothing: it is right."""

    wrong: Sequence[str]
    found: Sequence[Break]
    """At the last look."""


def kind_of(found: Break) -> str:
    """A break's kind as the table stores it."""
    return str(getattr(found.kind, "value", found.kind))


def judge(case: Case, looks: Sequence[Sequence[Break]], start_ms: int) -> Verdict:
    """Hold what the audit said at each look against what it has to say."""
    fault, wrong = case.fault, list[str]()
    allowed = fault.kinds | fault.also | ({UNEXPLAINED} if fault.kinds else set())
    brief = timedelta(seconds=30)
    for look in range(1, 3):
        found = looks[look]
        kinds = sorted({kind_of(each) for each in found})
        if fault.kinds and look >= fault.by_look and not fault.kinds.intersection(kinds):
            wrong.append(f"look {look}: {kinds or 'nothing'} in place of {sorted(fault.kinds)}")
        for each in found:
            passing = kind_of(each) == TIMING and each.age <= brief
            if kind_of(each) not in allowed and not passing:
                wrong.append(f"look {look}: also {kind_of(each)}: {each.explanation}")
            for untrue in fault.never_says:
                if _UNTRUE[untrue].search(each.explanation):
                    wrong.append(f"look {look}: says {untrue!r}: {each.explanation}")
            at = int(each.opened_at.timestamp() * 1000) - start_ms
            late = fault.options.skew_ms == 0 and fault.engine is not NoSnapshots
            if (
                late and at < SINCE - 30 * SECOND
            ):  # a later report speaks of the decisions before it
                wrong.append(
                    f"look {look}: open {SINCE - at} ms before the fault: {each.headline()}"
                )
    right = [each.explanation for each in looks[2] if kind_of(each) in fault.kinds]
    size = re.escape(f"{case.size / 100:g}")
    for said in fault.says:
        pattern = said.replace("{size}", size)
        if right and not any(re.search(pattern, each) for each in right):
            wrong.append(f"no sentence has {pattern}: {right}")
    return Verdict(tuple(dict.fromkeys(wrong)), tuple(looks[2]))


CASES: Sequence[Case] = tuple(case for fault in FAULTS for case in fault.cases())


def look_at(client: Client, cases: Sequence[Case], seed: int = 1) -> dict[Case, Verdict]:
    """Plant the cases side by side, let the audit look as time passes, and judge what it said."""
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(
        milliseconds=LOOKS[-1] + 5 * SECOND
    )
    start_ms = int(start.timestamp()) * 1000
    planted = {case: case.plant(start_ms, seed) for case in cases}
    markets = [market for made in planted.values() for market in made]
    parameters = Parameters(lookback_minutes=30)
    looks: dict[str, list[list[Break]]] = {market.ticker: [] for market in markets}
    for after, until in itertools.pairwise((-1, *LOOKS)):
        insert(client, markets, after, until)
        breaks.update(client, audit.CHECKS, parameters)
        for said in looks.values():
            said.append([])
        for found in stored(client):
            looks[found.market_ticker][-1].append(found)
    return {case: judge(case, looks[made[0].ticker], start_ms) for case, made in planted.items()}


def stored(client: Client) -> list[Break]:
    """The breaks as `mm_inventory_breaks` has them now."""
    columns = ", ".join(column.name for column in fields(Break))
    rows = client.query(
        f"SELECT {columns} FROM mm_inventory_breaks FINAL ORDER BY opened_at, check_name"
    ).result_rows
    return [Break(*row) for row in rows]
