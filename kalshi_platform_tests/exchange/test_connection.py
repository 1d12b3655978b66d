"""Dialling: signed headers reach one server only, and decompression bombs are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from kalshi_platform.exchange.connection import LiveConnection, dial
from kalshi_platform.exchange.errors import ExchangeError
from kalshi_platform.exchange.signing import Credentials, Ed25519Signer


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
def test_no_redirect_is_followed_and_no_compression_offered(status: str) -> None:
    seen: dict[str, list[bytes]] = {"first": [], "second": []}

    async def go() -> None:
        async def second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen["second"].append(await reader.readline())
            writer.close()

        other = await asyncio.start_server(second, "127.0.0.1", 0)
        target = f"ws://127.0.0.1:{other.sockets[0].getsockname()[1]}/trade-api/ws/v2"

        async def first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen["first"].append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(f"HTTP/1.1 {status}\r\nLocation: {target}\r\n\r\n".encode())
            await writer.drain()
            writer.close()

        exchange = await asyncio.start_server(first, "127.0.0.1", 0)
        url = f"ws://127.0.0.1:{exchange.sockets[0].getsockname()[1]}/trade-api/ws/v2"
        credentials = Credentials("id", Ed25519Signer(ed25519.Ed25519PrivateKey.generate()))
        async with other, exchange:
            with pytest.raises(ExchangeError, match=f"HTTP {status[:3]}"):
                await dial(url, credentials, LiveConnection)

    asyncio.run(go())
    assert seen["second"] == []
    [request] = seen["first"]
    assert b"kalshi-access-signature" in request.lower()
    assert b"sec-websocket-extensions" not in request.lower()


def test_an_untrusted_certificate_is_refused(tmp_path: Path) -> None:
    import datetime
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    from kalshi_platform.exchange.errors import Unreachable
    from kalshi_platform.exchange.rest import RestClient
    from kalshi_platform.settings import Exchange

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)

    async def go() -> None:
        asked: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.read(100))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        host = f"localhost:{server.sockets[0].getsockname()[1]}"
        credentials = Credentials("id", Ed25519Signer(ed25519.Ed25519PrivateKey.generate()))
        exchange = Exchange(f"wss://{host}/ws", f"https://{host}/v2", "id", pem, simulated=False)
        async with server:
            with pytest.raises(Unreachable, match="certificate"):
                await dial(exchange.ws_url, credentials, LiveConnection)
            with (
                RestClient(exchange, credentials=credentials, attempts=1) as client,
                pytest.raises(Unreachable, match="certificate"),
            ):
                await asyncio.to_thread(client.balance)
        assert asked == []

    asyncio.run(go())
