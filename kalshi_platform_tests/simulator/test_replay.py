"""Replay: a recorded file comes over the wire byte for byte, and its last books are the truth."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.replay import Recording, ReplaySession, check, read
from kalshi_platform.simulator.wire import Wire
from kalshi_platform_tests.simulator.ledger import Ledger

NOW = 1_795_435_200_000_000_000
A = {"market_ticker": "KXA-26-T1", "market_id": "11111111-1111-1111-1111-111111111111"}
B = {"market_ticker": "KXB-26-T2", "market_id": "22222222-2222-2222-2222-222222222222"}


def frame(kind: str, seq: int, **msg: Any) -> dict[str, Any]:
    return {"type": kind, "sid": 1, "seq": seq, "msg": msg}


CURRENT: list[dict[str, Any]] = [
    {"type": "subscribed", "id": 2, "msg": {"channel": "orderbook_delta", "sid": 1}},
    frame("orderbook_snapshot", 1, **A, yes_dollars_fp=[["0.0800", "300.00"], ["0.4700", "3.50"]]),
    {"type": "ok", "id": 3, "sid": 1, "seq": 2, "msg": {"market_tickers": ["KXA-26-T1"]}},
    frame("orderbook_snapshot", 3, **B, no_dollars_fp=[["0.5200", "1.00"]]),
    frame("orderbook_delta", 4, **A, price_dollars="0.4700", delta_fp="-3.50", side="yes"),
    frame("orderbook_delta", 5, **B, price_dollars="0.5210", delta_fp="0.92", side="no"),
]
LEGACY: list[dict[str, Any]] = [
    {"type": "subscribed", "id": 1, "msg": {"channel": "orderbook_delta", "sid": 1}},
    frame("orderbook_snapshot", 1, market_ticker="GONE-26", market_id=""),
    frame("orderbook_snapshot", 2, **A, yes=[[8, 300]], no=None),
    frame("orderbook_delta", 3, **A, price=8, delta=-100, side="yes"),
    frame("orderbook_delta", 4, **A, price=91, price_dollars="0.910", delta=7, side="no"),
]


def written(folder: Path, frames: list[dict[str, Any]], name: str = "tape.jsonl") -> Path:
    path = folder / name
    # spaces that no encoder of ours would put there
    text = "".join(json.dumps(frame, separators=(" ,", ": ")) + "\n" for frame in frames).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def session(recording: Recording, speed: float | None = None) -> tuple[ReplaySession, list[int]]:
    clock = [0]
    return ReplaySession(recording, random.Random(1), speed, lambda: clock[0]), clock


def say(to: ReplaySession, command: str, **params: Any) -> None:
    to.receive(json.dumps({"id": 40, "cmd": command, "params": params}))


def subscribe(to: ReplaySession, *channels: str) -> None:
    say(to, "subscribe", channels=channels or ["orderbook_delta"], market_tickers=["KXA-26-T1"])


def listen(to: ReplaySession) -> list[bytes]:
    heard: list[bytes] = []
    while True:
        to.work()
        some = to.take()
        heard += some
        if not some and not to.busy:
            return heard


@pytest.mark.parametrize("name", ["tape.jsonl", "tape.jsonl.gz"])
def test_recorded_bytes_come_unchanged_after_subscribing(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, CURRENT, name)
    replay, _ = session(read(path, NOW, timed=False))
    assert listen(replay) == []
    subscribe(replay)
    raw = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    assert b"".join(listen(replay)) == raw


def test_the_books_at_the_end_are_those_of_the_frames(tmp_path: Path) -> None:
    books = read(written(tmp_path, CURRENT), NOW, timed=False).books()
    assert books["KXA-26-T1"].yes == {800: 30_000}
    assert books["KXA-26-T1"].no == {}
    assert books["KXB-26-T2"].no == {5200: 100, 5210: 92}


def test_legacy_cents_give_books_in_the_same_units(tmp_path: Path) -> None:
    recording = read(written(tmp_path, LEGACY), NOW, timed=False)
    assert recording.books()["KXA-26-T1"].yes == {800: 20_000}
    assert recording.books()["KXA-26-T1"].no == {9100: 700}
    assert recording.market("GONE-26") is None, "an answer for a ticker that does not exist"


def test_a_book_on_no_known_grid_is_kept_exactly(tmp_path: Path) -> None:
    odd = frame("orderbook_delta", 6, **A, price_dollars="0.5001", delta_fp="1.00", side="yes")
    recording = read(written(tmp_path, [*CURRENT, odd]), NOW, timed=False)
    assert recording.books()["KXA-26-T1"].yes == {800: 30_000, 5001: 100}


def test_subscriptions_during_the_replay_count_as_answered_by_it(tmp_path: Path) -> None:
    path = written(tmp_path, CURRENT)
    replay, _ = session(read(path, NOW, timed=False))
    subscribe(replay)
    subscribe(replay)
    assert b"".join(listen(replay)) == path.read_bytes()


def test_a_channel_that_was_not_recorded_gets_a_sid_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, CURRENT)
    replay, _ = session(read(path, NOW, timed=False))
    subscribe(replay, "orderbook_delta", "trade")
    heard = listen(replay)
    own = [each for each in heard if each not in path.read_bytes()]
    assert [json.loads(each) for each in own] == [
        {"type": "subscribed", "id": 40, "msg": {"channel": "trade", "sid": 2}}
    ]
    assert b"".join(each for each in heard if each not in own) == path.read_bytes()


def test_a_snapshot_requested_in_a_replay_follows_it_with_next_seq(
    tmp_path: Path,
) -> None:
    replay, _ = session(read(written(tmp_path, CURRENT), NOW, timed=False))
    subscribe(replay)
    tickers = ["KXB-26-T2"]
    say(replay, "update_subscription", sids=[1], action="get_snapshot", market_tickers=tickers)
    last = json.loads(listen(replay)[-1])
    assert (last["type"], last["id"], last["sid"], last["seq"]) == ("orderbook_snapshot", 40, 1, 6)
    assert last["msg"]["no_dollars_fp"] == [["0.5200", "1.00"], ["0.5210", "0.92"]]


def test_the_recorded_pace_is_kept_where_asked(tmp_path: Path) -> None:
    path = written(tmp_path, CURRENT)
    (tmp_path / "tape.recv_ms.txt").write_text("1000\n1000\n1500\n2000\n2000\n5000\n")
    replay, clock = session(read(path, NOW, timed=True), speed=2.0)
    subscribe(replay)
    heard = []
    for ms in (0, 249, 250, 500, 1999, 2000):
        clock[0] = ms * 1_000_000
        heard.append(len(replay.take()))
    assert heard == [2, 0, 1, 2, 0, 1]


def test_iso_times_beside_a_recording_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, CURRENT[:2], "tape.jsonl.gz")
    times = "2025-11-30T19:39:27.667988+00:00\n2025-11-30T19:39:28.667989+00:00\n"
    (tmp_path / "tape.recv.txt.gz").write_bytes(gzip.compress(times.encode()))
    assert read(path, NOW, timed=True).offsets_ns == (0, 1_000_001_000)


def test_a_lost_recorded_delta_is_a_gap_until_a_snapshot(tmp_path: Path) -> None:
    recording = read(written(tmp_path, CURRENT), NOW, timed=False)
    replay, _ = session(recording)
    replay.tamper("gap", 1)
    subscribe(replay)
    heard = [json.loads(each) for each in listen(replay)]
    assert [each.get("seq") for each in heard] == [None, 1, 2, 3, 5]
    assert replay.sent["lost"] == 1


@pytest.mark.parametrize("fault", ["negative", "huge", "crossed", "error10"])
def test_a_fault_that_would_change_the_recording_is_refused(fault: str) -> None:
    with pytest.raises(SimulatorError, match="would change the recorded"):
        check(Fault.parse(fault))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no frames"),
        ("not json\n", "line 1, is not a frame"),
        ('{"type":"orderbook_delta","sid":1,"seq":1,"msg":{"market_ticker":"X"}}\n', "line 1"),
        (
            "".join(json.dumps(each) + "\n" for each in [*CURRENT, CURRENT[4]]),
            "line 7, .*less than nothing.*--fault gap",
        ),
    ],
)
def test_a_file_that_cannot_be_replayed_is_named_with_the_line(
    tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "tape.jsonl"
    path.write_text(content)
    with pytest.raises(SimulatorError, match=says):
        read(path, NOW, timed=False)


def test_a_recording_without_times_has_no_pace(tmp_path: Path) -> None:
    path = written(tmp_path, CURRENT)
    with pytest.raises(SimulatorError, match="no receive times beside it"):
        read(path, NOW, timed=True)
    (tmp_path / "tape.recv.txt").write_text("1000\n")
    with pytest.raises(SimulatorError, match="1 times for 6 frames"):
        read(path, NOW, timed=False)


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="cannot be read"):
        read(tmp_path / "nothing.jsonl", NOW, timed=False)


FRAMES = Path(__file__).parents[3] / "shared" / "frames"


@pytest.mark.parametrize(
    ("name", "markets", "last_seq"),
    [
        ("ws_orderbook_12_markets_prod_2026-08-07.jsonl", 12, 268),
        ("ws_orderbook_trade_demo_2026-06-11.jsonl", 1, 5),
        ("ws_legacy_cents_2025-11-30.jsonl.gz", 1, 7664),
    ],
)
def test_real_recordings_come_verbatim_with_the_right_books(
    name: str, markets: int, last_seq: int
) -> None:
    path = FRAMES / name
    if not path.exists():
        pytest.skip("the recorded frames of the exchange are not here: ../shared/frames")
    recording = read(path, NOW, timed=False)
    replay, _ = session(recording)
    subscribe(replay)
    heard = listen(replay)
    raw = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    assert b"".join(heard) == raw
    assert recording.channels["orderbook_delta"] == (1, last_seq)
    assert len(recording.books()) == markets
    if "legacy" not in name:
        ledger = Ledger(wire=Wire.AUGUST)
        for each in heard:
            ledger.feed(each)
        assert {ticker: ledger.view(ticker) for ticker in recording.books()} == recording.books()


def test_the_clocks_of_a_recording_go_on_in_what_is_answered_after_it() -> None:
    path = FRAMES / "ws_made_2026-10_b.jsonl"
    if not path.exists():
        pytest.skip("the made frames are not here: ../shared/frames")
    recording = read(path, NOW + 30 * 86_400 * 10**9, timed=False)
    replay, _ = session(recording)
    tickers = list(recording.books())
    say(replay, "subscribe", channels=["orderbook_delta"], market_tickers=tickers)
    ledger = Ledger()
    for each in listen(replay):
        ledger.feed(each)
    say(
        replay,
        "update_subscription",
        sids=[recording.channels["orderbook_delta"][0]],
        action="get_snapshot",
        market_tickers=tickers,
    )
    snapshots = [ledger.feed(each)["msg"] for each in listen(replay)]  # it fails on a false clock
    truth = json.loads((FRAMES / "ws_made_2026-10.truth.jsonl").read_text().splitlines()[-1])
    assert {msg["market_ticker"]: msg["clock"] for msg in snapshots} == truth["clocks"]
    for ticker, sides in truth["books"].items():
        for side, levels in sides.items():
            assert dict(recording.books()[ticker].texts()[side]) == levels


def test_a_recording_without_clocks_is_answered_without_them(tmp_path: Path) -> None:
    replay, _ = session(read(written(tmp_path, CURRENT), NOW, timed=False))
    subscribe(replay)
    say(
        replay, "update_subscription", sids=[1], action="get_snapshot", market_tickers=["KXA-26-T1"]
    )
    *_, last = map(json.loads, listen(replay))
    assert (last["type"], last["id"]) == ("orderbook_snapshot", 40)
    assert "sending_ts_ms" not in last
    assert "clock" not in last["msg"]


def test_a_replay_takes_no_other_wire_than_that_of_its_frames(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="leave --wire out"):
        SimulatorConfig(replay=written(tmp_path, CURRENT), wire=Wire.AUGUST)
