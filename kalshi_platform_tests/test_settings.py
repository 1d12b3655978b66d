"""Settings are validated at the start, and an error names the variable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.settings import Settings, load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_every_setting_is_documented_and_nothing_else_is() -> None:
    documented = set(
        re.findall(r"^#([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    )
    assert documented == {name.upper() for name in Settings.model_fields}


def test_the_defaults_in_the_example_are_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = load()
    example = (ROOT / ".env.example").read_text()
    (tmp_path / ".env").write_text(re.sub(r"^#([A-Z0-9_]+=)", r"\1", example, flags=re.MULTILINE))
    assert load() == defaults


def test_without_a_key_it_is_the_simulator_and_with_one_the_exchange(tmp_path: Path) -> None:
    assert load().exchange.simulated
    exchange = load(prod_keyid="id", prod_keyfile=tmp_path / "key.pem").exchange
    assert not exchange.simulated
    assert exchange.ws_url == platform_settings.PRODUCTION_WS_URL


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("CLICKHOUSE_URL", "localhost:8123", "is not a URL"),
        ("CLICKHOUSE_URL", "http://me:secret@host", "must not carry a user or password"),
        ("HOT_RETENTION_DAYS", "soon", "integer"),
        ("CLICKHOUSE_DATABASE", "a; DROP TABLE x", "pattern"),
        ("PROD_KEYID", "only-the-id", "PROD_KEYFILE is not set"),
        ("PARQUET_DIR", "gs://bucket/path", "neither a folder nor s3://bucket/prefix"),
        ("PARQUET_DIR", "s3:bucket/path", "neither a folder nor s3://bucket/prefix"),
        ("PARQUET_DIR", "s3://", "is not s3://bucket/prefix"),
        ("PARQUET_DIR", "s3://bucket/path?region=x", "is not s3://bucket/prefix"),
        ("S3_ENDPOINT_URL", "minio:9000", "is not a URL"),
        ("AWS_ACCESS_KEY_ID", "only-the-id", "belong together"),
    ],
)
def test_a_bad_value_is_a_sentence_that_names_the_variable(
    name: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=remedy) as error:
        load()
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("KALSHI_WS_URL", "ws://simulator:8765/trade-api/ws/v2"),
        ("KALSHI_REST_URL", "http://10.0.0.7/trade-api/v2"),
    ],
)
def test_a_key_signs_nothing_that_others_on_the_way_could_read(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, url)
    assert load().exchange.simulated  # without a key: the bundled simulator, on any machine
    monkeypatch.setenv("PROD_KEYID", "s3cr3t-key")
    monkeypatch.setenv("PROD_KEYFILE", "key.pem")
    with pytest.raises(SettingsError, match="without TLS") as error:
        load()
    assert name in str(error.value)
    assert "s3cr3t" not in str(error.value)
    monkeypatch.setenv(name, "ws://127.0.0.1:8765/trade-api/ws/v2")
    assert not load().exchange.simulated


def test_secrets_are_in_no_repr_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLICKHOUSE_PASSWORD", "s3cr3t-password")
    monkeypatch.setenv("PROD_KEYID", "s3cr3t-key")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "s3cr3t-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "s3cr3t-token")
    monkeypatch.setenv("PROD_KEYFILE", str(tmp_path / "key.pem"))
    settings = load()
    for text in (repr(settings), str(settings), repr(settings.exchange)):
        assert "s3cr3t" not in text
    monkeypatch.setenv("HOT_RETENTION_DAYS", "soon")
    with pytest.raises(SettingsError) as error:
        load()
    assert "s3cr3t" not in str(error.value)
    assert error.value.__cause__ is None


def test_an_archive_is_a_folder_or_on_object_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = load(parquet_dir=tmp_path / "archive")
    assert (here.archive_base, here.archive_url) == (None, str(tmp_path / "archive"))
    assert here.archive_dir == tmp_path / "archive"
    monkeypatch.setenv("PARQUET_DIR", "s3://bucket/some/prefix/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    there = load()
    assert (there.archive_base, there.archive_url) == (
        "bucket/some/prefix",
        "s3://bucket/some/prefix",
    )
    assert there.archive_dir == there.data_dir / "outbox"
    assert (there.s3_endpoint_url, there.aws_region) == ("http://127.0.0.1:9000", "eu-central-1")


@pytest.mark.parametrize(
    "address", ["s3://id:s3cr3t@bucket/prefix", "s3://bucket/prefix?secret_key=s3cr3t"]
)
def test_a_key_in_the_archives_address_is_refused_without_being_shown(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARQUET_DIR", address)
    with pytest.raises(SettingsError) as error:
        load()
    assert "s3cr3t" not in str(error.value)


def test_a_password_in_a_url_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLICKHOUSE_URL", "http://me:s3cr3t@host")
    with pytest.raises(SettingsError) as error:
        load()
    assert "s3cr3t" not in str(error.value)
