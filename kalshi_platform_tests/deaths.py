"""Simulated kills: interrupt some work before or after its n-th step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for SIGKILL: a BaseException, so that no handler catches it."""


def die_at(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    acts: Sequence[tuple[Any, str]],
    *,
    after: bool,
    midway: Mapping[str, Callable[..., None]] | None = None,
) -> None:
    """Raise `Killed` at the step-th call of any of `acts` (owner, name), before or after the call.

    `midway` maps a name to the part of the act that is already done if the kill comes before its end.
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
