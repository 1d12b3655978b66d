"""Deliver one message to one channel in a process of its own: `python -m kalshi_platform.health.deliver`.

Reads a `Task` from stdin. Exits 0 if the message was accepted, else 1 with the reason on stdout. `outbox.py`
starts it and kills it at its deadline.
"""

from __future__ import annotations

import sys

from kalshi_platform import typed_json
from kalshi_platform.health.channels import ChannelError, Task


def main() -> int:
    """Deliver the task from stdin; returns the exit status."""
    task = typed_json.decode(sys.stdin.buffer.read(), Task)
    try:
        task.channel.send(task.message)
    except ChannelError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
