"""TLS to ClickHouse: whom to trust, what to show, and what a refused handshake means."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from kalshi_platform.errors import StoreRefused
from kalshi_platform.settings import Settings

__all__ = ["certificates", "may_want_a_certificate", "refusal"]


def certificates(settings: Settings) -> dict[str, Any]:
    """What the driver is to be given for TLS; empty where CLICKHOUSE_URL is not https.

    Raises `StoreRefused` for a file that is not there, or holds no certificate or key.
    """
    if not settings.clickhouse_url.startswith("https:"):
        return {}
    authority = _file(settings.clickhouse_ca_file)
    certificate = _file(settings.clickhouse_client_cert_file)
    key = _file(settings.clickhouse_client_key_file)
    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise _unreadable("CLICKHOUSE_CA_FILE", authority, "certificate (PEM)", error) from error
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise _unreadable(
            "CLICKHOUSE_CLIENT_CERT_FILE, CLICKHOUSE_CLIENT_KEY_FILE",
            f"{certificate}, {key}",
            "certificate and its private key (PEM)",
            error,
        ) from error
    return {
        name: value
        for name, value in (
            ("ca_cert", authority),
            ("client_cert", certificate),
            ("client_cert_key", key),
        )
        if value is not None
    }


def refusal(error: BaseException, settings: Settings | None) -> str | None:
    """A sentence, where it was the handshake that failed; None for any other trouble."""
    found = next((each for each in _causes(error) if isinstance(each, ssl.SSLError)), None)
    if found is None:
        return None
    place = f"ClickHouse at {settings.clickhouse_url}" if settings is not None else "ClickHouse"
    if isinstance(found, ssl.SSLCertVerificationError):
        return (
            f"{place} shows a certificate that is not trusted ({found.verify_message.rstrip('.')})."
            " Set CLICKHOUSE_CA_FILE to the certificate of the authority that signed it, and"
            " CLICKHOUSE_URL to a host name that it is made out to."
        )
    reason = str(found.reason or found)
    if "CERTIFICATE_REQUIRED" in reason or "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason:
        return (
            f"{place} wants a client certificate that it knows ({reason})."
            " Set CLICKHOUSE_CLIENT_CERT_FILE and CLICKHOUSE_CLIENT_KEY_FILE."
        )
    return (
        f"{place} does not speak TLS as we do ({reason}). Check the port in CLICKHOUSE_URL"
        " (8443 by habit; 8123 is plain http), and whether the server wants a client certificate"
        " (CLICKHOUSE_CLIENT_CERT_FILE)."
    )


def may_want_a_certificate(error: BaseException, settings: Settings) -> bool:
    """Whether a connection that broke may have been refused for want of a client certificate.

    With TLS 1.3 the client believes itself let in before the server has looked: the refusal is then no
    more than a connection that ends.
    """
    return (
        settings.clickhouse_url.startswith("https:")
        and settings.clickhouse_client_cert_file is None
        and any(
            isinstance(each, ConnectionResetError | BrokenPipeError | ConnectionAbortedError)
            for each in _causes(error)
        )
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what is behind it, as urllib3 and the driver wrap it."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.append(one)
        behind = (getattr(one, "reason", None), one.__cause__, one.__context__, *one.args)
        waiting += [each for each in behind if isinstance(each, BaseException)]
    return seen


def _file(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser())


def _unreadable(names: str, paths: str | None, what: str, error: OSError) -> StoreRefused:
    return StoreRefused(
        f"{names}: {paths} cannot be read as a {what}: {error.strerror or error}. Give one that can."
    )
