"""Malformed requests are client errors and use bounded memory."""

from __future__ import annotations

import http.client
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from kalshi_platform.embedded_clickhouse import Running, running
from kalshi_platform.embedded_clickhouse.encodings import PREFERENCE, compressor
from kalshi_platform_tests.embedded_clickhouse.conftest import PATIENCE_S

BAD = b"\xff\xfe\xe9"
HEADERS = (
    *("X-ClickHouse-Database", "X-ClickHouse-User", "X-ClickHouse-Key", "X-ClickHouse-Format"),
    *("Authorization", "Accept-Encoding", "Content-Encoding", "Content-Type", "Host", "Origin"),
    *("Sec-Fetch-Site", "User-Agent", "Cookie", "Referer", "Expect", "X-Forwarded-For"),
)
URLS = (
    *(b"/?query=SELECT+1&%s=%%FF%%E9" % name for name in (b"database", b"query", b"param_x")),
    *(b"/?query=SELECT+1&%s=%%FF" % name for name in (b"query_id", b"user", b"session_id")),
    *(b"/?query=SELECT+1&%s=%%FF" % name for name in (b"default_format", b"max_threads")),
    *(b"/?%FF=1&query=SELECT+1", b"/?query=SELECT+'%ED%A0%80'", b"/?query=SELECT+1;%00"),
    *(b"/\xff\xfe", b"/?query=SELECT+'\xff'", b"/?\xff", b"/?=&&&=", b"/?query", b"/%FF?query=%FF"),
    *(
        b"/?query=SELECT+1&default_format=%s" % name
        for name in (b"ArrowTable", b"DataFrame", b"J%0d%0aX")
    ),
    *(b"/?query=SELECT+1&%s=x" % n for n in (b"session_timeout", b"max_query_size", b"a'b")),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A separate server whose log would show a traceback."""
    with running(tmp_path_factory.mktemp("odd")) as url:
        yield url
        url.process.terminate()
        assert url.process.stderr
        assert "Traceback" not in url.process.stderr.read()


def _status(server: Running, url: bytes, headers: dict[str, bytes], body: bytes = b"") -> int:
    at = urlsplit(server)
    client = http.client.HTTPConnection(str(at.hostname), at.port, timeout=PATIENCE_S)
    client.connect()
    lines = {"Host": f"{at.hostname}:{at.port}".encode(), **headers}
    lines["Content-Length"] = b"%d" % len(body)
    head = b"".join(b"%s: %s\r\n" % (n.encode(), v) for n, v in lines.items())
    client.sock.sendall(b"POST " + url + b" HTTP/1.1\r\n" + head + b"\r\n" + body)
    answer = http.client.HTTPResponse(client.sock, method="POST")
    answer.begin()
    answered = answer.read()
    client.close()
    # ClickHouse gives 500 to some of its errors; one that is no ClickHouse error is the server's fault
    assert answer.status < 500 or answer.headers["X-ClickHouse-Exception-Code"], (
        url,
        headers,
        answered,
    )
    return answer.status


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_not_utf8_is_no_fault_of_the_server(server: Running, name: str) -> None:
    for value in (BAD, b"x" + BAD, b"multipart/form-data; boundary=" + BAD, b"http://[" + BAD, b""):
        _status(server, b"/", {name: value}, b"SELECT 1")
    if name == "X-ClickHouse-Database":
        assert _status(server, b"/", {name: BAD}, b"SELECT 1") == 400


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_is_not_utf8_is_no_fault_of_the_server(server: Running, url: bytes) -> None:
    status = _status(server, url, {})
    if b"%FF" in url.partition(b"?")[2] and b"param_" not in url:  # a parameter may be any bytes
        assert status in {400, 403, 404}


def test_a_form_that_is_none_is_no_fault_of_the_server(server: Running) -> None:
    kind = {"Content-Type": b"multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="query"\r\n%s\r\n\r\n%s\r\n--b--\r\n'
    for body in (
        *(b"", BAD, b"--b--", part % (b"", BAD), part % (b"Content-Type: multipart/mixed", b"x")),
        *(part % (b"Content-Transfer-Encoding: base64", b"!!!"), b"--b\r\n\r\nSELECT 1\r\n--b--"),
    ):
        assert _status(server, b"/", kind, body) == 400


def test_noise_in_every_part_is_no_fault_of_the_server(server: Running) -> None:
    chance = random.Random(4)
    plain = [n for n in range(33, 256) if n not in b"#"]
    for _ in range(150):
        noise = [bytes(chance.choices(plain, k=chance.randrange(1, 30))) for _ in range(4)]
        headers = {chance.choice(HEADERS): noise[0]}
        _status(server, b"/?" + noise[1] + b"=" + noise[2], headers, noise[3])


def _bomb(encoding: str, unit: bytes, count: int) -> bytes:
    packed = compressor(encoding)
    return b"".join(packed.compress(unit) for _ in range(count)) + packed.flush()


def _peak_mb(server: Running) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures it")
@pytest.mark.parametrize("encoding", PREFERENCE)
def test_a_query_that_unpacks_to_a_gigabyte_is_refused(server: Running, encoding: str) -> None:
    bomb = _bomb(encoding, b" " * (1 << 20), 1024)
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    before = _peak_mb(server)
    answer = httpx.post(
        server, content=bomb, headers={"Content-Encoding": encoding}, timeout=PATIENCE_S
    )
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (400, "62")
    assert _peak_mb(server) - before < 100


def test_a_form_without_end_is_refused(server: Running) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="query"\r\n\r\n'
        for _ in range(64):
            yield b" " * (1 << 20)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = httpx.post(server, content=endless(), headers=kind, timeout=PATIENCE_S)
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (400, "62")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server on a disk that has little more room than the server needs."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        with running(disk) as url:
            yield url
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("encoding", PREFERENCE)
def test_an_inserts_data_leaves_room_on_the_disk(encoding: str, small_disk: Running) -> None:
    bomb = _bomb(encoding, (b"x" * 1023 + b"\n") * 1024, 1024)
    query = {"query": "INSERT INTO FUNCTION null('s String') FORMAT LineAsString"}
    packed = {"Content-Encoding": encoding}
    answer = httpx.post(small_disk, params=query, content=bomb, headers=packed, timeout=PATIENCE_S)
    assert answer.headers["X-ClickHouse-Exception-Code"] == "243"
    assert "No room for the request body" in answer.text
    assert httpx.post(small_disk, content="SELECT 1", timeout=PATIENCE_S).text == "1\n"


def test_sigterm_is_handled_while_a_long_text_is_read(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        heredocs = b"SELECT " + b" ".join(b"$%d$" % n for n in range(9_000))
        answer = httpx.post(url, content=heredocs, timeout=PATIENCE_S)
        assert answer.headers["X-ClickHouse-Exception-Code"] == "62"
        url.process.terminate()
        assert url.process.wait(timeout=15) == 0
