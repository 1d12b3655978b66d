"""Who is let in: signatures, clocks and the simulator's own key."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from kalshi_platform.exchange.signing import Credentials, Ed25519Signer, RsaSigner, load_signer
from kalshi_platform.simulator import keys
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.keys import KeyRing, own_key

NOW_MS = 1_795_435_200_000
PATH = "/trade-api/v2/portfolio/balance"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED_KEY = ed25519.Ed25519PrivateKey.generate()


@pytest.fixture
def ring() -> KeyRing:
    ring = KeyRing(max_skew_seconds=10)
    ring.register("rsa", RSA_KEY.public_key())
    ring.register("ed", ED_KEY.public_key())
    return ring


def signed(key_id: str = "rsa", *, late_ms: int = 0, path: str = PATH) -> Mapping[str, str]:
    signer = RsaSigner(RSA_KEY) if key_id == "rsa" else Ed25519Signer(ED_KEY)
    return Credentials(key_id, signer, lambda: NOW_MS - late_ms).headers("GET", path)


@pytest.mark.parametrize("key_id", ["rsa", "ed"])
def test_a_signed_request_is_let_in(ring: KeyRing, key_id: str) -> None:
    assert ring.refusal(signed(key_id), "GET", PATH, NOW_MS) is None


@pytest.mark.parametrize("key_id", ["rsa", "ed"])
def test_a_signature_over_something_else_is_refused(ring: KeyRing, key_id: str) -> None:
    other = signed(key_id, path="/trade-api/v2/portfolio/fills")
    assert ring.refusal(other, "GET", PATH, NOW_MS) == keys.WRONG_SIGNATURE
    assert ring.refusal(signed(key_id), "POST", PATH, NOW_MS) == keys.WRONG_SIGNATURE


def test_another_keys_signature_is_refused(ring: KeyRing) -> None:
    stolen = {**signed("rsa"), "KALSHI-ACCESS-KEY": "ed"}
    assert ring.refusal(stolen, "GET", PATH, NOW_MS) == keys.WRONG_SIGNATURE


def test_a_signature_that_is_not_base64_is_refused(ring: KeyRing) -> None:
    broken = {**signed(), "KALSHI-ACCESS-SIGNATURE": "~~~"}
    assert ring.refusal(broken, "GET", PATH, NOW_MS) == keys.WRONG_SIGNATURE


@pytest.mark.parametrize("late_ms", [-10_000, -5_000, 0, 5_000, 10_000])
def test_a_clock_within_ten_seconds_is_good_enough(ring: KeyRing, late_ms: int) -> None:
    assert ring.refusal(signed(late_ms=late_ms), "GET", PATH, NOW_MS) is None


@pytest.mark.parametrize("late_ms", [-300_000, -10_001, 10_001, 30_000])
def test_a_clock_further_off_is_refused(ring: KeyRing, late_ms: int) -> None:
    assert ring.refusal(signed(late_ms=late_ms), "GET", PATH, NOW_MS) == keys.EXPIRED


def test_an_unknown_key_is_refused(ring: KeyRing) -> None:
    unknown = {**signed(), "KALSHI-ACCESS-KEY": "00000000-0000-0000-0000-000000000000"}
    assert ring.refusal(unknown, "GET", PATH, NOW_MS) == keys.UNKNOWN_KEY


@pytest.mark.parametrize("header", ["KEY", "TIMESTAMP", "SIGNATURE"])
def test_a_missing_header_is_refused(ring: KeyRing, header: str) -> None:
    headers = {**signed()}
    del headers[f"KALSHI-ACCESS-{header}"]
    assert ring.refusal(headers, "GET", PATH, NOW_MS) == keys.MISSING


def test_refusals_equal_the_recorded_ones_of_the_exchange() -> None:
    recorded = Path(__file__).parents[3] / "shared" / "frames" / "rest_demo_2026-06-11.jsonl"
    if not recorded.exists():
        pytest.skip("the recorded answers of the exchange are not here: ../shared/frames")
    bodies = {
        answer["name"]: answer["body"]
        for answer in map(json.loads, recorded.read_text().splitlines())
        if answer["status"] == 401
    }
    assert bodies["auth__bad_signature"] == keys.WRONG_SIGNATURE
    assert bodies["auth__unknown_key_id"] == keys.UNKNOWN_KEY
    assert bodies["auth__missing_signature_header"] == keys.MISSING
    assert bodies["auth__skew_minus30s"] == keys.EXPIRED


def test_the_key_is_made_once_for_its_owner_only_and_kept(tmp_path: Path) -> None:
    key_file = tmp_path / "simulator" / "key.pem"
    made = own_key(key_file)
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert [each.name for each in key_file.parent.iterdir()] == ["key.pem"]
    pem = key_file.read_bytes()
    assert own_key(key_file) == made
    assert key_file.read_bytes() == pem
    ring = KeyRing(10)
    ring.register("simulator", made)
    headers = Credentials("simulator", load_signer(key_file), lambda: NOW_MS).headers("GET", PATH)
    assert ring.refusal(headers, "GET", PATH, NOW_MS) is None


def test_simulators_that_start_together_share_one_key(tmp_path: Path) -> None:
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(own_key(tmp_path / "key.pem")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert all(key == made[0] for key in made)


def test_a_file_that_is_not_a_key_is_named_and_left_alone(tmp_path: Path) -> None:
    key_file = tmp_path / "key.pem"
    key_file.write_text("a shopping list")
    with pytest.raises(SimulatorError, match=f"{key_file} is not a PEM private key. Remove it"):
        own_key(key_file)
    assert key_file.read_text() == "a shopping list"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SimulatorError, match="cannot be written or read"):
        own_key(tmp_path / "file" / "key.pem")
