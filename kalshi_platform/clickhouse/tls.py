"""TLS to ClickHouse: certificates for the driver, and sentences for failed handshakes."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from kalshi_platform.errors import StoreRefused
from kalshi_platform.settings import Settings

__all__ = ["certificates", "may_require_a_certificate", "refusal"]


def certificates(settings: Settings) -> dict[str, Any]:
    """The driver's TLS options; empty if CLICKHOUSE_URL is not https.

    Raises `StoreRefused` for a file that is missing, or holds no certificate or key.
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
    """A sentence if the TLS handshake failed; None for any other error."""
    found = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), None)
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
            f"{place} requires a client certificate that it trusts ({reason})."
            " Set CLICKHOUSE_CLIENT_CERT_FILE and CLICKHOUSE_CLIENT_KEY_FILE."
        )
    return (
        f"The TLS handshake with {place} failed ({reason}). Check the port in CLICKHOUSE_URL"
        " (8443 by default; 8123 is plain http), and whether the server requires a client certificate"
        " (CLICKHOUSE_CLIENT_CERT_FILE)."
    )


def may_require_a_certificate(error: BaseException, settings: Settings) -> bool:
    """Whether a connection may have been closed because the client certificate is missing.

    With TLS 1.3 a rejected client certificate surfaces only as a later connection reset.
    """
    return (
        settings.clickhouse_url.startswith("https:")
        and settings.clickhouse_client_cert_file is None
        and any(
            isinstance(cause, ConnectionResetError | BrokenPipeError | ConnectionAbortedError)
            for cause in _causes(error)
        )
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all its causes, also those that urllib3 and the driver keep in `reason` and `args`."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.append(current)
        causes = (
            getattr(current, "reason", None),
            current.__cause__,
            current.__context__,
            *current.args,
        )
        waiting += [cause for cause in causes if isinstance(cause, BaseException)]
    return seen


def _file(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser())


def _unreadable(names: str, paths: str | None, kind: str, error: OSError) -> StoreRefused:
    return StoreRefused(
        f"{names}: {paths} cannot be read as a {kind}: {error.strerror or error}. Give one that can."
    )
