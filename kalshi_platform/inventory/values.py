"""What an engine hands over, made into what a row holds, or refused at once.

Every function takes the argument's name first and gives the converted value. `WrongType` is a `TypeError`,
`BadValue` a `ValueError`; both name the argument, the value and what is wanted. Nothing is guessed: a float is
not an exact number, a text is not a number, and None is taken only where "there is none" has a meaning.
"""

from __future__ import annotations

import math
import operator
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar

import msgspec
import numpy as np

from kalshi_platform.errors import PlatformError

NOTHING = float("nan")
"""A price that there is not: no best bid, no target."""
MOST_CONTRACTS = Decimal(10**12)
_LEAST = -MOST_CONTRACTS
MOST_TEXT, MOST_JSON = 10_000, 1_000_000
"""Characters of a text, and of a JSON object."""
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""Times that a row may have: from the first up to the second."""
_SHOWN = 80
_ZERO, _ONE = Decimal(0), Decimal(1)

M = TypeVar("M", bound=Enum)
T = TypeVar("T")


class InventoryError(PlatformError):
    """What an engine handed over cannot be a position, an order or a fill."""


class WrongType(InventoryError, TypeError):
    """An argument has a type that cannot be recorded."""


class BadValue(InventoryError, ValueError):
    """An argument has the right type and an impossible value."""


def shown(value: object) -> str:
    """A value for a sentence: its repr, cut, even where the repr itself fails."""
    try:
        said = repr(value)
    except Exception as error:  # noqa: BLE001 - another's repr may raise anything
        said = f"<repr raises {type(error).__name__}>"
    said = said.encode(errors="backslashreplace").decode()
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"


def _wrong(name: str, value: object, wanted: str) -> WrongType:
    return WrongType(f"{name} is {shown(value)}, a {type(value).__name__}: give {wanted}.")


def _bad(name: str, value: object, wanted: str) -> BadValue:
    return BadValue(f"{name} is {shown(value)}: give {wanted}.")


def one_of(name: str, value: object, kind: type[T]) -> T:
    """An object of a class, for what has no conversion."""
    if not isinstance(value, kind):
        raise _wrong(name, value, f"a {kind.__name__}")
    return value


def member(name: str, value: object, kind: type[M]) -> M:
    """A member of an enum, and nothing that only looks like one."""
    if type(value) is not kind:
        choices = " or ".join(f"{kind.__name__}.{each.name}" for each in kind)
        raise _wrong(name, value, f"{choices}; {kind.__name__}(…) makes one of the exchange's text")
    return value


def member_or_text(name: str, value: object, kind: type[M]) -> M:
    """A member of an enum, or exactly its text."""
    if isinstance(value, kind):
        return value
    said = text(name, value)
    try:
        return kind(said)
    except ValueError:
        choices = ", ".join(str(each.value) for each in kind)
        raise _bad(name, value, f"one of {choices}") from None


def text(name: str, value: object, most: int = MOST_TEXT) -> str:
    """A text that is not empty. A UUID becomes its text, an enum of texts its value."""
    said = optional_text(name, value, most)
    if value is None:
        raise _wrong(name, value, "a text")
    if not said:
        raise _bad(name, value, "a text that is not empty")
    return said


def optional_text(name: str, value: object, most: int = MOST_TEXT) -> str:
    """A text; None is the empty one."""
    if type(value) is str:
        said = value
    elif value is None:
        return ""
    elif isinstance(value, uuid.UUID):
        return str(value)
    elif isinstance(value, str):
        said = str(value.value) if isinstance(value, Enum) else str.__str__(value)
    else:
        raise _wrong(name, value, "a text")
    if len(said) > most:
        raise BadValue(f"{name} has {len(said):,} characters: give at most {most:,}.")
    if not said.isascii():
        try:
            said.encode()
        except UnicodeEncodeError:
            raise _bad(name, value, "a text of whole characters (it has half of a pair)") from None
    return said


def texts(name: str, value: object) -> list[str]:
    """Texts in order. One text alone is not taken for its letters."""
    if type(value) is not list and (
        isinstance(value, str | bytes) or not isinstance(value, Iterable)
    ):
        raise _wrong(name, value, "a list of texts")
    return [text(name, each) for each in value]


def flag(name: str, value: object) -> bool:
    """True or False."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _wrong(name, value, "True or False")


def real(name: str, value: object) -> float:
    """A finite number."""
    number = real_or_nothing(name, value)
    if math.isnan(number):
        raise _bad(name, value, "a finite number")
    return number


def real_or_nothing(name: str, value: object) -> float:
    """A finite number; None and NaN say that there is none."""
    if type(value) is float:
        number = value
    elif value is None:
        return NOTHING
    elif isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | Decimal | np.integer | np.floating
    ):
        raise _wrong(name, value, "a number")
    else:
        try:
            number = float(value)
        except (ArithmeticError, ValueError):
            raise _bad(name, value, "a finite number") from None
    if math.isinf(number):
        raise _bad(name, value, "a finite number")
    return number


def real_amount(name: str, value: object) -> float:
    """A finite number: none or more."""
    number = real(name, value)
    if number < 0:
        raise _bad(name, value, "0 or more")
    return number


def exact(name: str, value: object) -> Decimal:
    """A number of which every digit counts: Decimal or int, at most 10**12 either way."""
    if type(value) is Decimal:
        number = value
    elif isinstance(value, Decimal):
        number = Decimal(value)
    elif isinstance(value, int | np.integer) and not isinstance(value, bool):
        number = Decimal(operator.index(value))
    else:
        raise _wrong(name, value, "an exact number, such as Decimal('2.50') or 2")
    if not number.is_finite():
        raise _bad(name, value, "a finite number")
    if not _LEAST <= number <= MOST_CONTRACTS:
        raise _bad(name, value, f"at most {MOST_CONTRACTS:,}, either way")
    return number


def whole(name: str, value: object) -> int:
    """A whole number: none or more."""
    number = amount(name, value)
    if number != number.to_integral_value():
        raise _bad(name, value, "a whole number")
    return int(number)


def count(name: str, value: object) -> Decimal:
    """Contracts: more than none."""
    number = exact(name, value)
    if number <= 0:
        raise _bad(name, value, "more than 0 contracts")
    return number


def amount(name: str, value: object) -> Decimal:
    """Contracts or dollars: none or more."""
    number = exact(name, value)
    if number < _ZERO:
        raise _bad(name, value, "0 or more")
    return number


def dollars(name: str, value: object) -> Decimal:
    """The price of a contract: 0 to 1 dollar."""
    number = exact(name, value)
    if not _ZERO <= number <= _ONE:
        raise _bad(name, value, "dollars from 0 to 1 (44 cents are Decimal('0.44'))")
    return number


def moment(name: str, value: object) -> datetime:
    """A time with a zone, from 2000 to 2099, as UTC in whole milliseconds."""
    if not isinstance(value, datetime):
        raise _wrong(name, value, "a datetime with a time zone")
    if value.tzinfo is None or value.utcoffset() is None:
        raise BadValue(f"{name} has a time without a zone: {shown(value)}. Give UTC.")
    if not EARLIEST <= value < LATEST:
        raise _bad(name, value, "a time from 2000 to 2099")
    at = value.astimezone(UTC)
    ms = at.microsecond // 1000 * 1000
    return datetime(at.year, at.month, at.day, at.hour, at.minute, at.second, ms, UTC)


def identity(name: str, value: object) -> str:
    """A UUID, or its text; None is the UUID of zeros."""
    if type(value) is uuid.UUID:
        return str(value)
    said = optional_text(name, value) or str(uuid.UUID(int=0))
    try:
        return str(uuid.UUID(said))
    except ValueError:
        raise _bad(name, value, "a UUID") from None


def json_object(name: str, value: object) -> str:
    """A JSON object's text. None is the empty one, and a number that is not finite becomes null."""
    if value is None:
        return "{}"
    if type(value) is not dict:
        if not isinstance(value, Mapping):
            raise _wrong(name, value, "a mapping")
        value = dict(value)
    try:
        said = _ENCODER.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WrongType(f"{name} cannot be written as JSON ({shown(str(error))}).") from None
    if len(said) > MOST_JSON:
        raise BadValue(f"{name} is {len(said):,} characters of JSON: give at most {MOST_JSON:,}.")
    return said


def _plain(value: object) -> Any:
    """NumPy's scalars and arrays, and mappings that are no dict, for the encoder."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
