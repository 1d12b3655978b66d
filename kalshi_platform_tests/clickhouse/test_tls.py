"""TLS to ClickHouse: the right certificates connect, and every wrong one is a sentence with a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands import doctor
from kalshi_platform.errors import SettingsError, StoreError
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.clickhouse.tls_front import Authority, Pair, in_front_of

Front = Callable[..., int]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The authority that the client trusts."""
    return Authority(tmp_path, "ours")


@pytest.fixture
def front(clickhouse_url: str) -> Iterator[Front]:
    """Starts TLS in front of the embedded engine."""
    behind = urlsplit(clickhouse_url).port
    assert behind is not None
    with ExitStack() as stack:
        yield lambda own, **others: stack.enter_context(in_front_of(behind, own, **others))


@pytest.fixture
def own(authority: Authority) -> Pair:
    """The server's certificate, for `localhost` and 127.0.0.1."""
    return authority.sign("localhost", ip="127.0.0.1")


def refusal_of(url: str, **files: Any) -> str:
    """The sentence with which connecting fails."""
    with pytest.raises(StoreError) as error:
        connect(settings_for(url, "default", **files), database=False)
    return str(error.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_platform_works_through_tls(
    authority: Authority, own: Pair, front: Front, clickhouse_database: str, host: str
) -> None:
    url = f"https://{host}:{front(own)}"
    settings = settings_for(url, clickhouse_database, clickhouse_ca_file=authority.certificate)
    assert migrations.migrate(settings) == list(migrations.available())
    with closing(connect(settings)) as client:
        assert client.query("SELECT count() FROM orderbook_events").first_row == (0,)


def test_a_certificate_of_an_unknown_authority_is_not_trusted(
    own: Pair, front: Front, tmp_path: Path
) -> None:
    url = f"https://localhost:{front(own)}"
    for files in ({}, {"clickhouse_ca_file": Authority(tmp_path, "others").certificate}):
        sentence = refusal_of(url, **files)
        assert re.search(rf"ClickHouse at {url} shows a certificate that is not trusted", sentence)
        assert "Set CLICKHOUSE_CA_FILE to the certificate of the authority" in sentence


def test_a_certificate_for_another_host_is_not_trusted(authority: Authority, front: Front) -> None:
    url = f"https://localhost:{front(authority.sign('elsewhere.example'))}"
    sentence = refusal_of(url, clickhouse_ca_file=authority.certificate)
    assert "elsewhere" not in url
    assert "localhost" in sentence
    assert "CLICKHOUSE_URL to a host name that it is made out to" in sentence


def test_a_client_certificate_is_sent_if_required(
    authority: Authority, own: Pair, front: Front
) -> None:
    url = f"https://localhost:{front(own, clients=authority.certificate)}"
    ours = authority.sign("kalshi-streamer")
    trusted = {"clickhouse_ca_file": authority.certificate}
    shown = {
        "clickhouse_client_cert_file": ours.certificate,
        "clickhouse_client_key_file": ours.key,
    }
    settings = settings_for(url, "default", **trusted, **shown, clickhouse_password="")
    with closing(connect(settings, database=False)) as client:
        assert client.query("SELECT 1").first_row == (1,)
    assert "CLICKHOUSE_CLIENT_CERT_FILE" in refusal_of(url, **trusted)


def test_plain_http_behind_an_https_url_is_named(clickhouse_url: str) -> None:
    sentence = refusal_of(clickhouse_url.replace("http:", "https:"))
    assert "The TLS handshake with" in sentence
    assert "Check the port in CLICKHOUSE_URL" in sentence


def test_invalid_certificate_files_are_named(own: Pair, tmp_path: Path) -> None:
    url = "https://localhost:9"
    nothing = tmp_path / "nothing.pem"
    assert str(nothing) in refusal_of(url, clickhouse_ca_file=nothing)
    nothing.write_text("no certificate")
    assert refusal_of(url, clickhouse_ca_file=nothing).startswith("CLICKHOUSE_CA_FILE: ")
    swapped = {
        "clickhouse_client_cert_file": own.key,
        "clickhouse_client_key_file": own.certificate,
    }
    assert refusal_of(url, **swapped).startswith("CLICKHOUSE_CLIENT_CERT_FILE, ")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"clickhouse_ca_file": "ca.crt"}, "CLICKHOUSE_URL .* not encrypted"),
        ({"clickhouse_client_key_file": "a.key"}, "belong together"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        platform_settings.load(_env_file=None, clickhouse_url="http://localhost:8123", **values)


def test_doctor_says_what_is_wrong_with_the_certificate(
    own: Pair, front: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", f"https://localhost:{front(own)}")
    monkeypatch.setattr(doctor, "CHECKS", {"ClickHouse": doctor.CHECKS["ClickHouse"]})
    platform_settings.current.cache_clear()
    result = CliRunner().invoke(doctor.command)
    platform_settings.current.cache_clear()
    assert result.exit_code == 1
    assert "✗ ClickHouse — ClickHouse at https://localhost" in result.stdout
    assert "CLICKHOUSE_CA_FILE" in result.stdout
