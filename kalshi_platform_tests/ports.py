"""Free ports for programs that a test starts later, perhaps more than once."""

from __future__ import annotations

import os
import random
import socket

FIRST, EACH = 12_000, 2_000
"""Below the kernel's ephemeral range, so that no connection takes a port between its choice and its use."""
_dice = random.SystemRandom()


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback interface, different for each worker of pytest."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    own = range(FIRST + worker * EACH, FIRST + (worker + 1) * EACH)
    found: list[int] = []
    for port in _dice.sample(own, len(own)):
        if len(found) == count:
            return found
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    raise AssertionError(f"no {count} ports are free in {own}")


def answers(port: int) -> bool:
    """Whether a program accepts connections on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
