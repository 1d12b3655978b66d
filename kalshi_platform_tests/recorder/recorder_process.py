"""A recorder of one connection, as a process that a test can stop and continue: FOLDER URL LIVENESS_S.

It ends on SIGTERM, or with its first connection.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ed25519

from kalshi_platform.exchange.signing import Credentials, Ed25519Signer
from kalshi_platform.journal.writer import Writer
from kalshi_platform.recorder import capture


async def record(writer: Writer, url: str) -> None:
    """Record until SIGTERM or until the first connection has ended."""
    key = ed25519.Ed25519PrivateKey.generate()
    recording = capture.Capture(url, lambda: Credentials("id", Ed25519Signer(key)), writer, ["A-1"])
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, recording.stop)
    running = asyncio.create_task(recording.run())
    while not running.done() and not recording.counters.disconnects:
        await asyncio.sleep(0.01)
    recording.stop()
    await running


if __name__ == "__main__":
    vars(capture)["LIVENESS_S"] = float(sys.argv[3])
    journal = Writer(Path(sys.argv[1]))
    asyncio.run(record(journal, sys.argv[2]))
    journal.close()
