"""The whole simulator over real sockets: handshakes, pings, truth, faults of the connection."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from websockets.frames import Opcode
from websockets.sync.client import connect

from kalshi_platform.exchange.signing import Credentials, Ed25519Signer, load_signer
from kalshi_platform.simulator.book import BookView
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.server import Simulator, running
from kalshi_platform.simulator.wire import Wire
from kalshi_platform_tests.simulator.dialled import PATH, Dialled
from kalshi_platform_tests.simulator.ledger import Ledger
from kalshi_platform_tests.simulator_fixtures import StartSimulator


def settle(client: Dialled, ledger: Ledger, truth: dict[str, BookView]) -> None:
    """Listen until the client's books are the truth; the frames run out where they never are."""
    for text in client.texts():
        ledger.feed(text)
        if truth.keys() <= ledger.books.keys() and all(
            ledger.view(ticker) == view for ticker, view in truth.items()
        ):
            return
    raise AssertionError("the connection ended first")


def test_a_clients_books_are_the_simulators_at_every_level(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(rate=2_000, rolling_markets=5, rolling_seconds=1)
    with Dialled(simulator) as one, Dialled(simulator) as two:
        tickers = list(simulator.books())
        one.subscribe(tickers)
        two.subscribe(tickers[::2])
        deadline = time.monotonic() + 3  # long enough for rolling markets to open and close
        ledgers = Ledger(), Ledger()
        texts = one.texts(), two.texts()
        while time.monotonic() < deadline:
            for ledger, frames in zip(ledgers, texts, strict=True):
                ledger.feed(next(frames))
        simulator.pause()
        truth = simulator.books()
        settle(one, ledgers[0], {ticker: truth[ticker] for ticker in tickers})
        settle(two, ledgers[1], {ticker: truth[ticker] for ticker in tickers[::2]})
        assert ledgers[0].kinds["orderbook_snapshot"] > len(tickers), "no market was cleared"
        assert len(simulator.state()["connections"]) == 2


@pytest.mark.parametrize("library", ["websockets"])
def test_an_ordinary_client_library_gets_on_with_it(simulator: Simulator, library: str) -> None:
    assert library == "websockets"
    headers = Credentials(simulator.key_id, load_signer(simulator.key_file)).headers("GET", PATH)
    with connect(simulator.ws_url, additional_headers=dict(headers), max_size=None) as client:
        client.send(json.dumps({"id": 1, "cmd": "list_subscriptions"}))
        answer = str(client.recv(timeout=10))
        sent_ms = json.loads(answer)["sending_ts_ms"]
        assert abs(sent_ms - time.time() * 1000) < 60_000
        assert answer == f'{{"type":"ok","id":1,"sending_ts_ms":{sent_ms},"msg":[]}}\n'


def test_the_server_pings_with_its_word(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(heartbeat_seconds=0.1)
    with Dialled(simulator) as client:
        pings = (frame for frame in client.frames() if frame.opcode is Opcode.PING)
        assert [bytes(next(pings).data) for _ in range(3)] == [b"heartbeat"] * 3


def test_an_unsigned_dial_is_refused_as_on_the_real_exchange(simulator: Simulator) -> None:
    with Dialled(simulator, headers={}) as client:
        assert client.response is not None
        assert client.response.status_code == 401
        body = json.loads(client.response.body or b"")
        assert body["error"]["code"] == "signature_is_missing_from_headers"


def test_a_late_clock_is_refused(simulator: Simulator) -> None:
    late = Credentials(
        simulator.key_id,
        load_signer(simulator.key_file),
        lambda: time.time_ns() // 1_000_000 - 30_000,
    )
    with Dialled(simulator, late.headers("GET", PATH)) as client:
        assert client.response is not None
        assert b"header_timestamp_expired" in (client.response.body or b"")


def test_a_registered_ed25519_key_is_let_in(simulator: Simulator) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    simulator.register("another", key.public_key())
    headers = Credentials("another", Ed25519Signer(key)).headers("GET", PATH)
    with Dialled(simulator, headers) as client:
        assert client.response is not None
        assert client.response.status_code == 101


@pytest.mark.parametrize(
    ("fault", "status"), [("dial401", 401), ("dial429", 429), ("dial502", 502), ("skew", 401)]
)
def test_a_dial_can_be_refused_on_request(simulator: Simulator, fault: str, status: int) -> None:
    simulator.inject(f"{fault}:2")
    for expected in (status, status, 101):
        with Dialled(simulator) as client:
            assert client.response is not None
            assert client.response.status_code == expected


def test_a_drop_is_a_reset(simulator: Simulator) -> None:
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        next(client.texts())
        simulator.inject("drop")
        with pytest.raises(ConnectionResetError):
            list(client.frames())


def test_a_clean_close_carries_its_code(simulator: Simulator) -> None:
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        simulator.inject("close:1012")
        (last,) = [frame for frame in client.frames() if frame.opcode is Opcode.CLOSE]
        assert int.from_bytes(last.data[:2]) == 1012


def test_a_hang_is_silence_on_an_open_socket_then_a_reset(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(heartbeat_seconds=0.05)
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        simulator.inject("hang:6")  # what was on its way has come by then, and the silence too
        time.sleep(0.2)
        while not client.silent_for(0.4):  # what was on its way
            next(client.frames())
        client.send({"id": 5, "cmd": "list_subscriptions"})
        with pytest.raises(ConnectionResetError):
            list(client.frames())


def test_a_slow_line_delivers_everything_in_the_end(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(markets=5, rolling_markets=0, rate=1_000)
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        ledger = Ledger()
        texts = client.texts()
        while ledger.kinds["orderbook_delta"] == 0:
            ledger.feed(next(texts))
        simulator.inject("slow:8")  # long beside the silences that are listened for
        for text in client.texts_at_hand(0.3):
            ledger.feed(text)
        deltas = simulator.state()["deltas"]
        assert client.silent_for(0.3), "frames come although they are kept back"
        assert simulator.state()["deltas"] > deltas
        simulator.pause()
        settle(client, ledger, simulator.books())


def test_a_fault_without_a_connection_waits_for_the_next_one(simulator: Simulator) -> None:
    simulator.inject("close:1012")
    with Dialled(simulator) as client:
        assert Opcode.CLOSE in {frame.opcode for frame in client.frames()}
    with Dialled(simulator) as client:
        client.send({"id": 1, "cmd": "list_subscriptions"})
        assert b'"ok"' in next(client.texts())


def test_a_fault_can_come_later(simulator: Simulator) -> None:
    with Dialled(simulator) as client:
        client.send({"id": 1, "cmd": "list_subscriptions"})
        assert b'"ok"' in next(client.texts())
        asked_at = time.monotonic()
        simulator.inject("close:1012@0.5")
        assert Opcode.CLOSE in {frame.opcode for frame in client.frames()}
        assert time.monotonic() - asked_at >= 0.49


def test_a_client_that_does_not_read_gets_error_25(start_simulator: StartSimulator) -> None:
    # A machine that is busy makes up for time in steps of a megabyte and more: twice the limit, from
    # which on a client is cut off, must not be reached in one.
    simulator = start_simulator(rate=20_000, max_backlog_bytes=4_000_000)
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        while simulator.state()["connections"][0]["sent"].get("error", 0) == 0:
            time.sleep(0.05)
        ledger = Ledger()
        error = next(f for f in map(ledger.feed, client.texts()) if f["type"] == "error")
        assert error["msg"]["code"] == 25
        assert ledger.seqs[1] > 1_000


def test_a_crossed_book_is_seen_by_clients_and_in_the_truth(
    start_simulator: StartSimulator,
) -> None:
    simulator = start_simulator(rate=500, rolling_markets=0)
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        simulator.inject("crossed:60")
        simulator.pause()
        truth = simulator.books()
        settle(client, Ledger(), truth)
        both = [view for view in truth.values() if view.yes and view.no]
        assert sum(max(view.yes) + max(view.no) >= 10_000 for view in both) == 1


def test_paused_books_stand_still_until_they_are_resumed(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(rate=5_000)
    simulator.pause()
    still = simulator.books()
    time.sleep(0.1)
    assert simulator.books() == still
    simulator.resume()
    deadline = time.monotonic() + 10
    while simulator.books() == still:
        assert time.monotonic() < deadline, "nothing moves after the pause"


def test_a_replay_comes_over_the_wire_verbatim(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    frames = [
        '{"type":"subscribed","id":2,"msg":{"channel":"orderbook_delta","sid":1}}',
        '{"type":"orderbook_snapshot","sid":1,"seq":1,"msg":{"market_ticker":"KXA-26-T1",'
        '"market_id":"11111111-1111-1111-1111-111111111111","yes_dollars_fp":[["0.0800","3.00"]]}}',
        *(
            f'{{"type":"orderbook_delta","sid":1,"seq":{seq},"msg":{{"market_ticker":"KXA-26-T1",'
            '"market_id":"11111111-1111-1111-1111-111111111111","price_dollars":"0.0900",'
            '"delta_fp":"1.00","side":"no","ts":"2026-08-07T00:00:00Z","ts_ms":1786060800000}}'
            for seq in range(2, 20_000)
        ),
    ]
    path = tmp_path / "tape.jsonl"
    path.write_text("".join(f"{frame}\n" for frame in frames))
    simulator = start_simulator(replay=path)
    market = httpx.get(f"{simulator.rest_url}/markets", params={"tickers": "KXA-26-T1"}).json()
    assert market["markets"][0]["status"] == "active"
    book = httpx.get(f"{simulator.rest_url}/markets/KXA-26-T1/orderbook").json()
    assert book["orderbook_fp"]["no_dollars"] == [["0.0900", "19998.00"]]
    with Dialled(simulator) as client:
        client.subscribe(["KXA-26-T1"])
        texts = client.texts()
        assert b"".join(next(texts) for _ in frames) == path.read_bytes()
        client.send({"id": 9, "cmd": "list_subscriptions"})
        assert json.loads(next(texts))["msg"] == [{"channel": "orderbook_delta", "sid": 1}]
    assert simulator.books()["KXA-26-T1"].no == {900: 1_999_800}


def test_a_fault_that_a_replay_cannot_have_is_said_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    path.write_text('{"type":"subscribed","id":2,"msg":{"channel":"orderbook_delta","sid":1}}\n')
    faults = (Fault.parse("negative@5"),)
    simulator = Simulator(SimulatorConfig(replay=path, faults=faults))
    with pytest.raises(SimulatorError, match="would change the recorded"):
        simulator.start()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SimulatorError, match=f"cannot listen on 127.0.0.1:{port}"):
            Simulator(SimulatorConfig(port=port))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"markets": 0}, "markets is 0"),
        ({"rate": -1.0}, "rate is -1"),
        ({"markets": 2, "rolling_markets": 3}, "rolling_markets is 3: give 0 to 2"),
        ({"replay_speed": 0.0}, "replay_speed is 0"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(SimulatorError, match=says):
        SimulatorConfig(**wrong)  # type: ignore[arg-type]


def test_a_simulator_that_is_not_running_says_so() -> None:
    with running() as simulator:
        assert simulator.books()
    with pytest.raises(SimulatorError, match="not running"):
        simulator.books()
    assert not simulator.key_file.exists(), "its own folder is gone with it"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "kalshi_platform", "simulate", "--port", "0"]
    with subprocess.Popen(
        [*command, "--markets", "3", "--fault", "gap@100"],
        cwd=tmp_path,
        env={**os.environ, "KALSHI_DATA_DIR": str(tmp_path / "data")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(5)]
            said = {line.split()[0]: line.split()[-1] for line in lines[:2]}
            key_file = tmp_path / "data" / "simulator" / "key.pem"
            headers = Credentials("simulator", load_signer(key_file)).headers("GET", PATH)
            with connect(said["WebSocket"], additional_headers=dict(headers)):
                assert len(httpx.get(f"{said['REST']}/markets").json()["markets"]) == 3
                process.send_signal(number)
                _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert err == ""
    assert str(key_file) in lines[-1]


def test_the_command_answers_nonsense_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        for arguments, says in (
            (["--port", taken], f"cannot listen on 127.0.0.1:{taken}"),
            (["--port", "0", "--fault", "gup"], "'gup' is unknown"),
            (["--port", "0", "--replay", "nothing.jsonl"], "nothing.jsonl cannot be read"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "kalshi_platform", "simulate", *arguments],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 1
            assert done.stderr.startswith("Error: ")
            assert says in done.stderr
            assert done.stderr.count("\n") == 1


def test_maintenance_drops_clients_refuses_new_ones_and_is_in_the_schedule(
    start_simulator: StartSimulator,
) -> None:
    simulator = start_simulator(rate=500)
    status, schedule = (f"{simulator.rest_url}/exchange/{page}" for page in ("status", "schedule"))
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        next(client.texts())
        simulator.inject("maintenance:6")
        simulator.inject("clock_reset")
        with pytest.raises(ConnectionError):
            for _ in client.texts():
                pass
    closed = httpx.get(status).json()
    assert (closed["exchange_active"], closed["trading_active"]) == (False, False)
    (window,) = httpx.get(schedule).json()["schedule"]["maintenance_windows"]
    begin, end = (datetime.fromisoformat(window[f"{edge}_datetime"]) for edge in ("start", "end"))
    assert (end - begin).total_seconds() == 6
    with Dialled(simulator) as refused:
        assert refused.response is not None
        assert refused.response.status_code == 502
    books = httpx.get(f"{simulator.control_url}/books").json()["books"].values()
    assert {book["clock"] for book in books} == {0, 1}
    while not httpx.get(status).json()["trading_active"]:
        time.sleep(0.05)
    assert datetime.now(UTC) >= end
    with Dialled(simulator) as client:
        client.subscribe(list(simulator.books()))
        ledger = Ledger()
        texts = client.texts()
        while not ledger.kinds["orderbook_delta"]:
            ledger.feed(next(texts))


@pytest.mark.parametrize("fault", ["clock_fell", "clock_reset"])
def test_a_wire_without_clocks_has_no_faults_of_clocks(
    start_simulator: StartSimulator, fault: str
) -> None:
    simulator = start_simulator(wire=Wire.AUGUST)
    with pytest.raises(SimulatorError, match="--wire 2026-10"):
        simulator.inject(fault)
