"""Decode a client's WebSocket commands and check their form.

What a command does is in session.py.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kalshi_platform import typed_json
from kalshi_platform.simulator.frames import ERROR_TEXTS


class Refused(Exception):
    """The command is answered with an error of this code."""

    def __init__(self, code: int) -> None:
        super().__init__(ERROR_TEXTS[code])
        self.code = code


class Params(msgspec.Struct):
    """The parameters of all commands."""

    channels: list[str] | None = None
    market_ticker: str | None = None
    market_tickers: list[str] | None = None
    market_id: str | None = None
    market_ids: list[str] | None = None
    sid: int | None = None
    sids: list[int] | None = None
    action: str | None = None
    use_yes_price: bool | None = None
    skip_ticker_ack: bool = False
    send_initial_snapshot: bool = False

    def tickers(self) -> list[str]:
        """The named markets, each once."""
        if self.market_id is not None or self.market_ids is not None:
            raise Refused(11)  # no filter by id here: refused, not silently ignored
        if self.market_ticker is None:
            return list(dict.fromkeys(self.market_tickers or ()))
        if self.market_tickers is not None:
            raise Refused(11)
        return [self.market_ticker]

    def all_sids(self) -> list[int]:
        """The named subscriptions, each once; at least one."""
        named = [self.sid] if self.sids is None and self.sid is not None else self.sids
        if not named:
            raise Refused(4)
        return list(dict.fromkeys(named))


class Command(msgspec.Struct):
    """One command. An id of 0 counts as none."""

    id: Annotated[int, msgspec.Meta(ge=0)] = 0
    cmd: str = ""
    params: Params | None = None


class _Identified(msgspec.Struct):
    id: Annotated[int, msgspec.Meta(ge=0)] = 0


def decoded(message: bytes | str) -> Command:
    """Decode a command. Raises `Refused`: 11 for a wrong type, 1 for what is not JSON."""
    try:
        return typed_json.decode(message, Command)
    except msgspec.ValidationError:
        raise Refused(11) from None
    except msgspec.DecodeError:
        raise Refused(1) from None


def id_of(message: bytes | str) -> int:
    """Return the id to answer to; 0 if none can be read."""
    try:
        return typed_json.decode(message, _Identified).id
    except msgspec.DecodeError:
        return 0
