"""Request signing: loads the private key and makes the headers of one request or dial.

The signed text is `<timestamp ms><METHOD><path>`: no host, no query string, no body. RSA keys sign
with PSS over SHA-256 (salt as long as the digest), Ed25519 keys sign the text itself. Sending requests
belongs in `rest` and `connection`.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import shlex
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from kalshi_platform.exchange.errors import CredentialsError

for _library in ("websockets.client", "httpcore"):
    # At level DEBUG, say through the root logger, they log every header: key id and signatures.
    logging.getLogger(_library).setLevel(logging.INFO)

PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)


class Signer(Protocol):
    """Signs bytes with a private key."""

    def sign(self, message: bytes) -> bytes:
        """Sign a text.

        Args:
            message: The bytes to sign.

        Returns:
            The raw signature.
        """


class RsaSigner:
    """RSA-PSS, SHA-256, salt length 32."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        """Take a key.

        Args:
            key: The private key.
        """
        self._key = key

    def sign(self, message: bytes) -> bytes:
        """Sign a text.

        Args:
            message: The bytes to sign.

        Returns:
            The raw signature.
        """
        return self._key.sign(message, PSS, hashes.SHA256())


class Ed25519Signer:
    """Ed25519 over the text itself."""

    def __init__(self, key: ed25519.Ed25519PrivateKey) -> None:
        """Take a key.

        Args:
            key: The private key.
        """
        self._key = key

    def sign(self, message: bytes) -> bytes:
        """Sign a text.

        Args:
            message: The bytes to sign.

        Returns:
            The raw signature.
        """
        return self._key.sign(message)


def signed_text(timestamp_ms: int | str, method: str, path: str) -> bytes:
    """Make the bytes that are signed.

    Args:
        timestamp_ms: Unix milliseconds, as in the header.
        method: The HTTP method; GET for a dial of the WebSocket.
        path: From /trade-api on; a query string is left out.

    Returns:
        `<timestamp ms><METHOD><path>`.
    """
    return f"{timestamp_ms}{method.upper()}{path.split('?', 1)[0]}".encode()


def load_signer(key_file: Path) -> Signer:
    """Read a PEM private key.

    As ssh does, it refuses a key of this user's own that others may read: the remedy is one command. A file that this user
    cannot close passes, and `doctor` points it out (`accessible_to_others`): one of another user, such as root's in a container,
    or on a read-only mount, as secrets are mounted.

    Args:
        key_file: The file that the exchange gave for the key.

    Returns:
        The signer of that key, RSA or Ed25519.

    Raises:
        CredentialsError: The file does not exist, cannot be read, is open to other users, or is no such key; the sentence
            says which, and quotes nothing of the file.
    """
    try:
        with key_file.open("rb") as file:
            if _is_unsafe(file.fileno()):
                raise CredentialsError(
                    f"Key file {key_file} can be read by other users of this machine, so it is not used."
                    f" Close it to them: chmod 600 {shlex.quote(str(key_file))}"
                )
            pem = file.read()
    except FileNotFoundError:
        raise CredentialsError(
            f"Key file {key_file} does not exist. Set PROD_KEYFILE to the private key that the exchange gave you."
        ) from None
    except IsADirectoryError:
        raise CredentialsError(
            f"Key file {key_file} is a folder. Set PROD_KEYFILE to the PEM file in it."
        ) from None
    except OSError as error:
        raise CredentialsError(
            f"Key file {key_file} cannot be read ({error.strerror}). Make it readable by this user: chmod 600."
        ) from None
    key = _private_key(key_file, pem)
    if isinstance(key, rsa.RSAPrivateKey):
        return RsaSigner(key)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return Ed25519Signer(key)
    raise CredentialsError(
        f"Key file {key_file} holds a {type(key).__name__}; the exchange takes RSA or Ed25519 keys."
    )


def _private_key(key_file: Path, pem: bytes) -> object:
    """Decode a PEM text, including common damage by pasting: line ends escaped or missing, a byte order
    mark, the header of the other of the two formats.

    No error quotes its cause, which may contain key material.
    """
    with suppress(ValueError, UnsupportedAlgorithm):
        try:
            return serialization.load_pem_private_key(pem, password=None)
        except TypeError:
            raise CredentialsError(
                f"Key file {key_file} is protected by a passphrase. Decrypt it first:"
                " openssl pkey -in KEY -out KEY.plain, then chmod 600."
            ) from None
    block = _PEM.search(pem.replace(rb"\r", b"").replace(rb"\n", b"\n"))
    if block is None:
        raise CredentialsError(f"Key file {key_file} {_describe_content(pem)} {_EXPECTED}")
    with suppress(ValueError, UnsupportedAlgorithm, TypeError):
        body = base64.b64decode(b"".join(block["body"].split()), validate=True)
        return serialization.load_der_private_key(body, password=None)
    raise CredentialsError(
        f"Key file {key_file} begins as a private key does, but what follows is damaged or incomplete"
        f" ({len(block['body']):,} characters). Copy or download it again, whole."
    )


_PEM = re.compile(
    rb"-----BEGIN (?:RSA )?PRIVATE KEY-----(?P<body>.*?)-----END (?:RSA )?PRIVATE KEY-----",
    re.DOTALL,
)
_EXPECTED = (
    "It must begin with '-----BEGIN PRIVATE KEY-----' or '-----BEGIN RSA PRIVATE KEY-----', and end with"
    " the END line of the same kind."
)


def _describe_content(pem: bytes) -> str:
    """Describe the content of a file without a private key."""
    if b"\0" in pem:
        return "is not a PEM private key but UTF-16 or binary: save it again as plain text."
    if (other := re.search(rb"-----BEGIN ([A-Z0-9 ]+)-----", pem)) is not None:
        begins = other[1].decode()
        if begins.endswith("PRIVATE KEY"):
            return f"is not a whole PEM private key: it has no end line for its {begins}."
        return f"is not a PEM private key: it holds a {begins}."
    return "is not a PEM private key."


def accessible_to_others(mode: int) -> bool:
    """Check whether a file's mode lets its group or other users read, change or run it.

    Args:
        mode: As `os.stat` has it.

    Returns:
        True where any of those bits is set.
    """
    return bool(mode & (stat.S_IRWXG | stat.S_IRWXO))


def _is_unsafe(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    if not accessible_to_others(status.st_mode) or status.st_uid != os.geteuid():
        return False
    return not os.fstatvfs(descriptor).f_flag & os.ST_RDONLY


class Credentials:
    """A key id with its signer; makes the headers of one request."""

    def __init__(
        self,
        key_id: str,
        signer: Signer,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Take a key id and its signer.

        Args:
            key_id: The API key's id.
            signer: From `load_signer`.
            clock_ms: The machine's clock, Unix milliseconds.
        """
        self._key_id = key_id
        self._signer = signer
        self._clock_ms = clock_ms

    def __repr__(self) -> str:
        return "Credentials(…)"

    def headers(self, method: str, path: str) -> Mapping[str, str]:
        """Sign a request.

        Args:
            method: The HTTP method; GET for a dial of the WebSocket.
            path: From /trade-api on; a query string is left out of what is signed.

        Returns:
            The signed headers, valid for the next seconds; sign again for every request.
        """
        timestamp = str(self._clock_ms())
        signature = self._signer.sign(signed_text(timestamp, method, path))
        return {
            "KALSHI-ACCESS-KEY": self._key_id,
            "KALSHI-ACCESS-TIMESTAMP": timestamp,
            "KALSHI-ACCESS-SIGNATURE": base64.b64encode(signature).decode(),
        }
