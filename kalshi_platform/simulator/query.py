"""The parameters of a REST request. Each one that is given must be read by its page, or the request is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from starlette.datastructures import QueryParams

T = TypeVar("T")


class Rejected(Exception):
    """The request is answered with an error, in one of the exchange's shapes."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(str(body))
        self.status = status
        self.body = body


def bad_request(details: str) -> Rejected:
    """Return the refusal of a request that makes no sense."""
    return Rejected(400, {"code": "bad_request", "message": "bad request", "details": details})


def failed(operation: str, field: str, tag: str) -> Rejected:
    """Return the refusal of a parameter that breaks a rule."""
    return Rejected(
        400,
        {
            "msg": f"Parameter validation failed for {operation}: Key: '{operation}Params.{field}'"
            f" Error:Field validation for '{field}' failed on the '{tag}' tag"
        },
    )


class Query:
    """The parameters of one request, by name; `path` has those of its path."""

    def __init__(self, given: QueryParams, path: Mapping[str, str]) -> None:
        self._given = given
        self._read: set[str] = set()
        self.path = path

    def texts(self, name: str) -> list[str]:
        """All values of a parameter that may be repeated, or hold a list with commas; none is empty."""
        self._read.add(name)
        return [one for text in self._given.getlist(name) for one in text.split(",") if one]

    def text(self, name: str) -> str | None:
        """Return a parameter's value, None if it is missing or empty."""
        self._read.add(name)
        values = self._given.getlist(name)
        if len(values) > 1:
            raise bad_request(f"{name} is given {len(values)} times")
        return values[0] or None if values else None

    def choice(self, name: str, known: Collection[str]) -> str | None:
        """Return a value that is one of the known ones."""
        value = self.text(name)
        if value is not None and value not in known:
            raise bad_request(f"{name} {value!r} is not one of {', '.join(known)}")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; false if it is missing."""
        return self.choice(name, ("true", "false")) == "true"

    def number(self, name: str, operation: str, *, default: int, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        text = self.text(name)
        if text is None:
            return default
        try:
            value = int(text)
        except ValueError:
            raise bad_request(f"{name} {text!r} is not a number") from None
        if not low <= value <= high:
            raise failed(operation, name.title(), "lte" if value > high else "gte")
        return value

    def seconds(self, name: str, operation: str) -> tuple[int | None, int | None]:
        """Return the times min_NAME and max_NAME, or min_ts and max_ts without a name; None if missing."""
        least, most = (f"{edge}_{name}_ts".replace("__", "_") for edge in ("min", "max"))
        return self.second(least, operation), self.second(most, operation)

    def second(self, name: str, operation: str) -> int | None:
        """Return a time in whole seconds, None if it is missing."""
        value = self.number(name, operation, default=-1, low=0, high=2**53)
        return None if value < 0 else value

    def only_zero(self, name: str) -> None:
        """Read a number that can only be 0 here: there is one subaccount and one shard."""
        text = self.text(name)
        if text not in {None, "0"}:
            raise bad_request(f"{name} {text!r} does not exist: there is only 0")

    def page(
        self, found: list[T], operation: str, most: int, name: Callable[[T], str]
    ) -> tuple[list[T], str]:
        """Return one page and the cursor of the next, '' at the end. A cursor is the id of the last item."""
        limit = self.number("limit", operation, default=100, low=1, high=most)
        cursor = self.text("cursor")
        # an unknown cursor starts at the first page, as on the real exchange
        start = next((at + 1 for at, item in enumerate(found) if name(item) == cursor), 0)
        page = found[start : start + limit]
        return page, name(page[-1]) if start + limit < len(found) else ""

    def refuse_unread(self) -> None:
        """Raises Rejected with the names of the parameters that the page has not read."""
        unread = [name for name in self._given if name not in self._read]
        if unread:
            known = ", ".join(sorted(self._read)) or "none"
            raise bad_request(
                f"the simulator does not read {', '.join(unread)} here; it reads {known}"
            )


def between(time_us: int, edges: tuple[int | None, int | None]) -> bool:
    """Whether a time lies between whole seconds, both included."""
    low, high = edges
    return (low is None or time_us >= low * 1_000_000) and (
        high is None or time_us <= high * 1_000_000
    )
