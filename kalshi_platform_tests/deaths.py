"""Dying at a chosen act: what a kill at any step of some work leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


class Killed(BaseException):
    """Nobody catches it: the process is gone."""


def die_at(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    acts: Sequence[tuple[Any, str]],
    *,
    after: bool,
    midway: Mapping[str, Callable[..., None]] | None = None,
) -> None:
    """Raise `Killed` at the step-th call of any of `acts` (owner, name), before or after it.

    `midway`: by name, what of an act is done already when one dies before its end.
    """
    left = step

    def dying(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            mine = left == 0
            if mine and not after:
                if midway and name in midway:
                    midway[name](*arguments)
                raise Killed
            result = act(*arguments, **named)
            if mine:
                raise Killed
            return result

        return acting

    for owner, name in acts:
        monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
