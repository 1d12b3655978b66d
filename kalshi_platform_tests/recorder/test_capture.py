"""Capture against the behaviour of a real exchange: refusals, silence, resets, thousands of markets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.connection import BatchedConnection, dial
from kalshi_platform.exchange.errors import CredentialsError
from kalshi_platform.exchange.signing import Credentials, Ed25519Signer, load_signer
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.recorder.capture import Capture
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.simulator_fixtures import StartSimulator


def credentials(simulator: Simulator) -> Credentials:
    return Credentials(simulator.key_id, load_signer(simulator.key_file))


def capture(simulator: Simulator, writer: Writer, tickers: list[str] | None = None) -> Capture:
    return Capture(
        simulator.ws_url, lambda: credentials(simulator), writer, tickers or list(simulator.books())
    )


def run(it: Capture, until: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Run capture until the condition holds; raise what ends it earlier."""

    async def both() -> None:
        running = asyncio.create_task(it.run())
        deadline = time.monotonic() + timeout_s
        while not until() and not running.done():
            assert time.monotonic() < deadline, "waited too long"
            await asyncio.sleep(0.02)
        it.stop()
        await running

    asyncio.run(both())


def notes(folder: Path, kind: str) -> list[dict[str, object]]:
    found = []
    for block in reader.record_ranges(folder, reader.oldest_offset(folder)):
        for record in block.batch.to_pylist():
            if (
                record["kind"] == Kind.NOTE
                and (note := json.loads(record["frame"]))["kind"] == kind
            ):
                found.append(note["detail"])
    return found


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.recorder.capture.BACKOFF_MAX_S", 0.5)


def test_a_silent_connection_is_closed_and_the_cause_noted(
    start_simulator: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liveness = "kalshi_platform.recorder.capture.LIVENESS_S"
    simulator = start_simulator(markets=4, rate=200.0, heartbeat_seconds=0.3)
    writer = Writer(tmp_path)
    it = capture(simulator, writer)
    hung = False

    def again() -> bool:
        nonlocal hung
        if not hung and it.counters.frames > 50:
            hung = True
            simulator.inject("hang")
            monkeypatch.setattr(liveness, 1.0)
        elif it.counters.disconnects:
            monkeypatch.setattr(liveness, 60.0)  # a busy machine may be silent for a second, too
        return it.counters.connections == 2 and it.markets == (4, 4)

    run(it, again)
    writer.close()
    assert [d["cause"] for d in notes(tmp_path, "disconnected")] == ["silent for 1 s", "stopped"]
    assert it.counters.disconnects == {"silent for 1 s": 1, "stopped": 1}
    silent, stopped = notes(tmp_path, "disconnected")
    assert 1.0 <= float(str(silent["span_s"])) <= float(str(silent["seconds"]))
    assert "span_s" not in stopped


@pytest.mark.slow
def test_a_quiet_exchange_that_pings_stays_connected(
    start_simulator: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine neither side may run for shorter times than this.
    monkeypatch.setattr("kalshi_platform.recorder.capture.LIVENESS_S", 10.0)
    simulator = start_simulator(markets=4, rate=0.0, heartbeat_seconds=0.3, rolling_markets=0)
    writer = Writer(tmp_path)
    it = capture(simulator, writer)
    counters = it.counters

    def heard_without_frames() -> bool:
        quiet_ns = counters.last_heard_ns - counters.last_frame_ns
        return it.markets == (4, 4) and quiet_ns > 11_000_000_000

    run(it, heard_without_frames)
    writer.close()
    assert counters.connections == 1
    assert counters.disconnects == {"stopped": 1}


@pytest.mark.parametrize("fault", ["dial502:2", "dial429:2"])
def test_an_unreachable_exchange_is_dialled_again(
    fault: str, start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=4)
    simulator.inject(fault)
    writer = Writer(tmp_path)
    it = capture(simulator, writer)
    run(it, lambda: it.markets == (4, 4))
    writer.close()
    assert it.counters.connections == 1


@pytest.mark.parametrize(
    ("fault", "sentence"), [("dial401", "does not know PROD_KEYID"), ("skew", "clock")]
)
def test_a_refused_key_or_clock_ends_capture_with_an_error(
    fault: str, sentence: str, start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=4)
    simulator.inject(fault)
    writer = Writer(tmp_path)
    with pytest.raises(CredentialsError, match=sentence):
        run(capture(simulator, writer), lambda: False)
    writer.close()


def test_a_403_page_of_a_proxy_is_retried(
    start_simulator: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page answers the first two dials, and the first one after a connection broke."""
    simulator = start_simulator(markets=4)
    pages = [2]
    met: list[str | None] = []

    async def passing(url: str, key: Credentials, kind: type[BatchedConnection]) -> Any:
        met.append(it.unreached)
        if pages[0]:
            pages[0] -= 1
            return await dial(page_url, key, kind)
        return await dial(url, key, kind)

    monkeypatch.setattr("kalshi_platform.recorder.capture.dial", passing)
    monkeypatch.setattr("kalshi_platform.recorder.capture.BACKOFF_MAX_S", 0.5)
    writer = Writer(tmp_path)
    it = capture(simulator, writer)

    def recorded() -> bool:
        if it.markets != (4, 4):
            return False
        if it.counters.connections == 1 and len(met) == 3:
            pages[0] = 1
            simulator.inject("drop")
        return it.counters.connections == 2

    with http_page(b"<html><center>CloudFront</center></html>") as page_url:
        run(it, recorded)
    writer.close()
    assert len(met) == 5
    assert "HTTP 403 (<html><center>CloudFront</center></html>)" in str(met[1])
    assert it.unreached is None


@contextmanager
def http_page(body: bytes) -> Iterator[str]:
    """A WebSocket's address, at which a proxy answers everything with HTTP 403 and its own page."""

    class Page(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.server_port}/trade-api/ws/v2"
        server.shutdown()


def test_an_ed25519_key_connects(start_simulator: StartSimulator, tmp_path: Path) -> None:
    simulator = start_simulator(markets=4)
    key = ed25519.Ed25519PrivateKey.generate()
    simulator.register("edward", key.public_key())
    writer = Writer(tmp_path)
    it = Capture(
        simulator.ws_url,
        lambda: Credentials("edward", Ed25519Signer(key)),
        writer,
        list(simulator.books()),
    )
    run(it, lambda: it.markets == (4, 4))
    writer.close()


def test_thousands_of_markets_on_one_sid_have_no_gap(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=2_500, rate=200.0, rolling_markets=0)
    writer = Writer(tmp_path)
    it = capture(simulator, writer)
    run(it, lambda: it.markets == (2_500, 2_500), timeout_s=120)
    writer.close()
    assert it.counters.gaps == 0
    assert it.counters.connections == 1


def test_the_observed_price_scale_overrides_use_yes_price(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=6, rate=200.0, rolling_markets=0, yes_price=True)
    writer = Writer(tmp_path)
    it = capture(simulator, writer)
    dropped: list[bool] = []

    def again() -> bool:
        if not dropped and it.counters.gaps == 1 and it.markets == (6, 6):
            simulator.inject("drop")
            dropped.append(True)
        return it.counters.connections == 2 and it.markets == (6, 6)

    run(it, again)
    writer.close()
    first, second = notes(tmp_path, "connected")
    assert (first["use_yes_price"], first["asked_yes_price"]) == (False, False)
    assert (second["use_yes_price"], second["asked_yes_price"]) == (True, False)
    assert [gap["cause"] for gap in notes(tmp_path, "gap") if "cause" in gap] == ["scale"]
    state = BookState()
    for block in reader.record_ranges(tmp_path, reader.oldest_offset(tmp_path)):
        _, state = build_rows(decode([block]), state)
    crossed = state.levels.group_by("market_ticker", "side").agg(pl.col("price").max())
    best = crossed.group_by("market_ticker").agg(pl.col("price").sum())
    assert best.height
    assert all(price < 10_000 for price in best["price"].to_list())
