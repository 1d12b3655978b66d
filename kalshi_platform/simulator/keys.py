"""The simulator's known keys, and the verification of signed requests.

The refusals are the real exchange's own, body by body.
"""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from kalshi_platform.exchange.signing import PSS, signed_text
from kalshi_platform.simulator.errors import SimulatorError

KEY_ID = "simulator"
PublicKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey

Refusal = Mapping[str, Mapping[str, str]]
"""The JSON body of a 401."""

MISSING: Refusal = {
    "error": {
        "code": "signature_is_missing_from_headers",
        "message": "signature is missing from headers",
    }
}
EXPIRED: Refusal = {
    "error": {"code": "header_timestamp_expired", "message": "header timestamp expired"}
}


def _authentication_error(details: str) -> Refusal:
    text = "authentication_error"
    return {"error": {"code": text, "message": text, "details": details}}


UNKNOWN_KEY = _authentication_error("NOT_FOUND")
WRONG_SIGNATURE = _authentication_error("INCORRECT_API_KEY_SIGNATURE")


class KeyRing:
    """The public keys by id, and how far a client's clock may be off."""

    def __init__(self, max_skew_seconds: float) -> None:
        self._keys: dict[str, PublicKey] = {}
        self._max_skew_ms = max_skew_seconds * 1000

    def register(self, key_id: str, key: PublicKey) -> None:
        """Accept requests that are signed with this key's private half."""
        self._keys[key_id] = key

    def refusal(
        self, headers: Mapping[str, str], method: str, path: str, now_ms: int
    ) -> Refusal | None:
        """Return why the request is refused; None if it is accepted. `headers` ignores case."""
        key_id = headers.get("KALSHI-ACCESS-KEY")
        timestamp = headers.get("KALSHI-ACCESS-TIMESTAMP")
        signature = headers.get("KALSHI-ACCESS-SIGNATURE")
        if not key_id or not timestamp or not signature:
            return MISSING
        if not timestamp.isdecimal() or abs(now_ms - int(timestamp)) > self._max_skew_ms:
            return EXPIRED
        key = self._keys.get(key_id)
        if key is None:
            return UNKNOWN_KEY
        try:
            raw = base64.b64decode(signature, validate=True)
            text = signed_text(timestamp, method, path)
            if isinstance(key, rsa.RSAPublicKey):
                key.verify(raw, text, PSS, hashes.SHA256())
            else:
                key.verify(raw, text)
        except (InvalidSignature, binascii.Error):
            return WRONG_SIGNATURE
        return None


def own_key(key_file: Path) -> PublicKey:
    """Return the public half of the key in `key_file`, which is created if it is missing.

    The file appears whole or not at all, readable by its owner only; of two simulators that
    start together, the second takes the first one's key.
    """
    try:
        if not key_file.exists():
            _make(key_file)
        pem = key_file.read_bytes()
    except OSError as error:
        raise SimulatorError(
            f"Key file {key_file} cannot be written or read ({error.strerror})."
            " Give the simulator a folder of its own: KALSHI_DATA_DIR."
        ) from None
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):  # the cause may quote key material: leave it out
        raise SimulatorError(
            f"Key file {key_file} is not a PEM private key. Remove it, and the simulator makes a new one."
        ) from None
    if not isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise SimulatorError(
            f"Key file {key_file} holds a {type(key).__name__}; the exchange takes RSA or Ed25519"
            " keys. Remove it, and the simulator makes a new one."
        )
    return key.public_key()


def _make(key_file: Path) -> None:
    key_file.parent.mkdir(parents=True, exist_ok=True)
    pem = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    handle, name = tempfile.mkstemp(dir=key_file.parent, prefix=".key-")  # 0600 from the start
    written = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(written, key_file)
        except FileExistsError:
            return  # another simulator was first
    finally:
        written.unlink()
