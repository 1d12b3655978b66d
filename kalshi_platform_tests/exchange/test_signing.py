"""Signing with both kinds of key; an unusable key file is an error with a remedy."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from kalshi_platform.exchange.errors import CredentialsError
from kalshi_platform.exchange.signing import PSS, Credentials, load_signer, signed_text

PLAIN = serialization.NoEncryption()


def pem(
    key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey,
    *,
    secret: bytes = b"",
) -> bytes:
    protection = serialization.BestAvailableEncryption(secret) if secret else PLAIN
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection
    )


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65_537, 2048)


def test_the_signed_text_has_no_query_string() -> None:
    assert (
        signed_text(1_700, "get", "/trade-api/v2/markets?limit=5")
        == b"1700GET/trade-api/v2/markets"
    )


def test_an_rsa_signature_verifies_as_pss_with_the_digests_salt(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    write(tmp_path / "key.pem", pem(rsa_key))
    headers = Credentials("id", load_signer(tmp_path / "key.pem"), lambda: 1_700).headers(
        "GET", "/trade-api/ws/v2"
    )
    assert headers["KALSHI-ACCESS-KEY"] == "id"
    assert headers["KALSHI-ACCESS-TIMESTAMP"] == "1700"
    signature = base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"])
    rsa_key.public_key().verify(signature, b"1700GET/trade-api/ws/v2", PSS, hashes.SHA256())


def test_an_ed25519_key_signs_the_text_itself(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    write(tmp_path / "key.pem", pem(key))
    signature = load_signer(tmp_path / "key.pem").sign(b"text")
    key.public_key().verify(signature, b"text")


def test_every_request_is_signed_again(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    write(tmp_path / "key.pem", pem(rsa_key))
    ticks = iter([1, 2])
    credentials = Credentials("id", load_signer(tmp_path / "key.pem"), lambda: next(ticks))
    first, second = (credentials.headers("GET", "/x") for _ in range(2))
    assert first != second


def test_an_unusable_key_file_is_reported_without_its_content(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    content = {
        "garbage": b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
        "passphrase": pem(rsa_key, secret=b"pass"),
        "curve": pem(ec.generate_private_key(ec.SECP256R1())),
    }
    remedy = {
        "garbage": "what follows is damaged or incomplete",
        "passphrase": "Decrypt it first",
        "curve": "RSA or Ed25519",
    }
    for name, text in content.items():
        write(tmp_path / name, text)
        with pytest.raises(CredentialsError, match=remedy[name]) as error:
            load_signer(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "c2VjcmV0" not in str(error.value)
        assert error.value.__cause__ is None
    with pytest.raises(CredentialsError, match="does not exist"):
        load_signer(tmp_path / "none")
    with pytest.raises(CredentialsError, match="is a folder"):
        load_signer(tmp_path)


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_pasted_key_is_read(tmp_path: Path, rsa_key: rsa.RSAPrivateKey, kind: str) -> None:
    key = rsa_key if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    whole = pem(key)
    pasted = {
        "escaped line ends": whole.replace(b"\n", b"\\n"),
        "escaped Windows line ends": whole.replace(b"\n", b"\\r\\n"),
        "one line": whole.replace(b"\n", b" "),
        "no line ends": whole.replace(b"\n", b""),
        "Windows line ends": whole.replace(b"\n", b"\r\n"),
        "byte order mark": b"\xef\xbb\xbf" + whole,
        "blanks around": b" \n\t" + whole.replace(b"\n", b" \n ") + b"\n\n",
        "PKCS#8 under an RSA header": whole.replace(b"PRIVATE KEY", b"RSA PRIVATE KEY"),
    }
    if kind == "rsa":
        pkcs1 = rsa_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, PLAIN
        )
        pasted["PKCS#1"] = pkcs1
        pasted["PKCS#1 under a PKCS#8 header"] = pkcs1.replace(b"RSA PRIVATE", b"PRIVATE")
    for name, text in pasted.items():
        signature = load_signer(write(tmp_path / "key.pem", text)).sign(b"text")
        if isinstance(key, rsa.RSAPrivateKey):
            key.public_key().verify(signature, b"text", PSS, hashes.SHA256())
        else:
            assert signature == key.sign(b"text"), name


def test_a_file_without_a_key_is_described(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    whole = pem(rsa_key)
    public = rsa_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for text, reason in (
        (public, "it holds a PUBLIC KEY"),
        (whole[: len(whole) // 2], "no end line"),
        (whole[:200] + whole[400:], "damaged or incomplete"),
        (whole.decode().encode("utf-16"), "UTF-16"),
        (b"0f1e2d3c-4b5a", "must begin with"),
        (b"", "must begin with"),
    ):
        with pytest.raises(CredentialsError, match=reason) as error:
            load_signer(write(tmp_path / "key.pem", text))
        assert str(tmp_path / "key.pem") in str(error.value)
        assert error.value.__cause__ is None


def test_credentials_have_no_secret_in_repr(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    write(tmp_path / "key.pem", pem(rsa_key))
    assert "my-key-id" not in repr(Credentials("my-key-id", load_signer(tmp_path / "key.pem")))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o666, 0o777])
def test_a_key_readable_by_others_is_refused_with_chmod(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, mode: int
) -> None:
    path = write(tmp_path / "my key.pem", pem(rsa_key), mode)
    with pytest.raises(CredentialsError, match="can be read by other users") as error:
        load_signer(path)
    subprocess.run(str(error.value).partition("to them: ")[2], shell=True, check=True)
    load_signer(path)


def test_a_key_whose_mode_this_user_cannot_change_is_used(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "key.pem", pem(rsa_key), 0o444)
    with monkeypatch.context() as on_a_read_only_mount:
        on_a_read_only_mount.setattr(
            os, "fstatvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY | os.ST_NOSUID)
        )
        load_signer(path)
    with monkeypatch.context() as other_user:
        other_user.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        load_signer(path)
    with pytest.raises(CredentialsError):
        load_signer(path)
