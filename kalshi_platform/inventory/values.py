"""Convert an engine's arguments to the values of a row, or refuse them at once.

Every function takes the argument's name first and returns the converted value. `WrongType` is a `TypeError`,
`BadValue` a `ValueError`; both name the argument, the value and what is expected. Nothing is guessed: a float is
not an exact number, a text is not a number, and None is accepted only for a value that may be missing.
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
"""The value of a missing price: no best bid, no target."""
MOST_CONTRACTS = Decimal(10**12)
_LEAST = -MOST_CONTRACTS
MOST_TEXT, MOST_JSON = 10_000, 1_000_000
"""Characters of a text, and of a JSON object."""
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""Times that a row may have: from the first to before the second."""
_SHOWN = 80
_ZERO, _ONE = Decimal(0), Decimal(1)

M = TypeVar("M", bound=Enum)
T = TypeVar("T")


class InventoryError(PlatformError):
    """An argument cannot be a position, an order or a fill."""


class WrongType(InventoryError, TypeError):
    """An argument has a type that cannot be recorded."""


class BadValue(InventoryError, ValueError):
    """An argument has the right type and an impossible value."""


def shown(value: object) -> str:
    """Return a value's repr for a message, shortened, even if the repr itself fails."""
    try:
        result = repr(value)
    except Exception as error:  # noqa: BLE001 - another's repr may raise anything
        result = f"<repr raises {type(error).__name__}>"
    result = result.encode(errors="backslashreplace").decode()
    return result if len(result) <= _SHOWN else f"{result[:_SHOWN]}…"


def _wrong(name: str, value: object, wanted: str) -> WrongType:
    return WrongType(f"{name} is {shown(value)}, a {type(value).__name__}: give {wanted}.")


def _bad(name: str, value: object, wanted: str) -> BadValue:
    return BadValue(f"{name} is {shown(value)}: give {wanted}.")


def one_of(name: str, value: object, kind: type[T]) -> T:
    """Require an instance of a class that has no conversion."""
    if not isinstance(value, kind):
        raise _wrong(name, value, f"a {kind.__name__}")
    return value


def member(name: str, value: object, kind: type[M]) -> M:
    """Require a member of an enum, not its value."""
    if type(value) is not kind:
        choices = " or ".join(f"{kind.__name__}.{choice.name}" for choice in kind)
        raise _wrong(name, value, f"{choices}; {kind.__name__}(…) makes one of the exchange's text")
    return value


def member_or_text(name: str, value: object, kind: type[M]) -> M:
    """Convert a member of an enum, or its exact text, to the member."""
    if isinstance(value, kind):
        return value
    result = text(name, value)
    try:
        return kind(result)
    except ValueError:
        choices = ", ".join(str(choice.value) for choice in kind)
        raise _bad(name, value, f"one of {choices}") from None


def text(name: str, value: object, most: int = MOST_TEXT) -> str:
    """Convert to a text that is not empty. A UUID becomes its text, a text enum its value."""
    result = optional_text(name, value, most)
    if value is None:
        raise _wrong(name, value, "a text")
    if not result:
        raise _bad(name, value, "a text that is not empty")
    return result


def optional_text(name: str, value: object, most: int = MOST_TEXT) -> str:
    """Convert to a text; None becomes the empty one."""
    if type(value) is str:
        result = value
    elif value is None:
        return ""
    elif isinstance(value, uuid.UUID):
        return str(value)
    elif isinstance(value, str):
        result = str(value.value) if isinstance(value, Enum) else str.__str__(value)
    else:
        raise _wrong(name, value, "a text")
    if len(result) > most:
        raise BadValue(f"{name} has {len(result):,} characters: give at most {most:,}.")
    if not result.isascii():
        try:
            result.encode()
        except UnicodeEncodeError:
            raise _bad(name, value, "a text of whole characters (it has half of a pair)") from None
    return result


def texts(name: str, value: object) -> list[str]:
    """Convert to a list of texts. A single text is refused, not split into letters."""
    if type(value) is not list and (
        isinstance(value, str | bytes) or not isinstance(value, Iterable)
    ):
        raise _wrong(name, value, "a list of texts")
    return [text(name, part) for part in value]


def flag(name: str, value: object) -> bool:
    """Require True or False."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _wrong(name, value, "True or False")


def real(name: str, value: object) -> float:
    """Convert to a finite number."""
    number = real_or_nothing(name, value)
    if math.isnan(number):
        raise _bad(name, value, "a finite number")
    return number


def real_or_nothing(name: str, value: object) -> float:
    """Convert to a finite number; None and NaN mean that there is none."""
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
    """Convert to a finite number of 0 or more."""
    number = real(name, value)
    if number < 0:
        raise _bad(name, value, "0 or more")
    return number


def exact(name: str, value: object) -> Decimal:
    """Convert to an exact number: Decimal or int, from -10**12 to 10**12."""
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
    """Convert to a whole number of 0 or more."""
    number = amount(name, value)
    if number != number.to_integral_value():
        raise _bad(name, value, "a whole number")
    return int(number)


def count(name: str, value: object) -> Decimal:
    """Convert to contracts: more than 0."""
    number = exact(name, value)
    if number <= 0:
        raise _bad(name, value, "more than 0 contracts")
    return number


def amount(name: str, value: object) -> Decimal:
    """Convert to contracts or dollars: 0 or more."""
    number = exact(name, value)
    if number < _ZERO:
        raise _bad(name, value, "0 or more")
    return number


def dollars(name: str, value: object) -> Decimal:
    """Convert to the price of a contract: 0 to 1 dollar."""
    number = exact(name, value)
    if not _ZERO <= number <= _ONE:
        raise _bad(name, value, "dollars from 0 to 1 (44 cents are Decimal('0.44'))")
    return number


def moment(name: str, value: object) -> datetime:
    """Convert a time with a zone, from 2000 to 2099, to UTC in whole milliseconds."""
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
    """Convert a UUID or its text to the text; None becomes the UUID of zeros."""
    if type(value) is uuid.UUID:
        return str(value)
    result = optional_text(name, value) or str(uuid.UUID(int=0))
    try:
        return str(uuid.UUID(result))
    except ValueError:
        raise _bad(name, value, "a UUID") from None


def json_object(name: str, value: object) -> str:
    """Encode a mapping as a JSON object. None becomes the empty object, a number that is not finite null."""
    if value is None:
        return "{}"
    if type(value) is not dict:
        if not isinstance(value, Mapping):
            raise _wrong(name, value, "a mapping")
        value = dict(value)
    try:
        result = _ENCODER.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WrongType(f"{name} cannot be written as JSON ({shown(str(error))}).") from None
    if len(result) > MOST_JSON:
        raise BadValue(f"{name} is {len(result):,} characters of JSON: give at most {MOST_JSON:,}.")
    return result


def _plain(value: object) -> Any:
    """Convert NumPy scalars and arrays, and mappings that are not a dict, for the encoder."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
