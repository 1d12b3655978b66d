"""Settings are validated at the start, and an error names the variable."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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


def test_a_key_selects_the_exchange_and_none_the_simulator(tmp_path: Path) -> None:
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
def test_a_key_requires_tls(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    local = load(parquet_dir=tmp_path / "archive")
    assert (local.archive_base, local.archive_url) == (None, str(tmp_path / "archive"))
    assert local.archive_dir == tmp_path / "archive"
    monkeypatch.setenv("PARQUET_DIR", "s3://bucket/some/prefix/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    remote = load()
    assert (remote.archive_base, remote.archive_url) == (
        "bucket/some/prefix",
        "s3://bucket/some/prefix",
    )
    assert remote.archive_dir == remote.data_dir / "outbox"
    assert (remote.s3_endpoint_url, remote.aws_region) == ("http://127.0.0.1:9000", "eu-central-1")


@pytest.mark.parametrize(
    "address", ["s3://id:s3cr3t@bucket/prefix", "s3://bucket/prefix?secret_key=s3cr3t"]
)
def test_a_key_in_the_archives_address_is_refused_unshown(
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


# -- what is pasted ----------------------------------------------------------------------------

KEY_ID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"


@pytest.mark.parametrize(
    "around", ["\n", "\r\n", " ", "\t", "\u200b", "\ufeff", "\u00a0", "\u2060 \n"]
)
def test_invisible_characters_around_a_value_are_stripped(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROD_KEYID", f"{around}{KEY_ID}{around}")
    monkeypatch.setenv("PROD_KEYFILE", f"key.pem{around}")
    monkeypatch.setenv("MARKET_TICKERS", f"KXA-1{around},{around}KXB-2{around}")
    monkeypatch.setenv("CLICKHOUSE_PASSWORD", " kept as it is \r\n")
    settings = load()
    assert settings.exchange.key_id == KEY_ID
    assert settings.exchange.key_file == Path("key.pem").absolute()
    assert settings.clickhouse_password.get_secret_value() == " kept as it is "


@pytest.mark.parametrize("within", ["\n", "\r", " ", "\u200b", "é", "\u2013", "\x7f", "\x00"])
def test_an_invalid_character_in_a_key_id_is_refused_unshown(within: str) -> None:
    with pytest.raises(SettingsError, match="PROD_KEYID contains") as error:
        load(prod_keyid=KEY_ID[:8] + within + KEY_ID[8:], prod_keyfile="key.pem")
    assert "(character 9)" in str(error.value)
    assert KEY_ID[:8] not in str(error.value)
    assert str(error.value).isprintable()


BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7s3cr3ts3cr3t"


@pytest.mark.parametrize(
    "name", ["PROD_KEYFILE", "CLICKHOUSE_CLIENT_KEY_FILE", "CLICKHOUSE_CLIENT_CERT_FILE"]
)
@pytest.mark.parametrize(
    "pasted",
    [
        f"-----BEGIN PRIVATE KEY-----\n{BODY}\n-----END PRIVATE KEY-----\n",
        f"-----BEGIN RSA PRIVATE KEY-----\\n{BODY}\\n-----END RSA PRIVATE KEY-----",
        f"{BODY}\n{BODY}",
        "MC4CAQAwBQYDK2VwBCIEINs3cr3ts3cr3ts3cr3ts3cr3ts3cr3ts3cr3tLqc",
    ],
)
def test_a_key_in_the_place_of_its_files_path_is_refused_unshown(
    name: str, pasted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROD_KEYID", KEY_ID)
    monkeypatch.setenv("PROD_KEYFILE", "key.pem")
    monkeypatch.setenv(name, pasted)
    with pytest.raises(SettingsError, match=f"{name} holds a key .* give the path") as error:
        load()
    assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("MARKET_TICKERS", "KXA\u200b-1"), ("CLICKHOUSE_URL", "http://ho\rst:8123")]
)
def test_an_invisible_character_inside_a_value_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} .*which no editor shows") as error:
        load()
    assert str(error.value).isprintable()


@given(st.sampled_from(sorted(Settings.model_fields)), st.text(max_size=30))
@example("clickhouse_url", "http://[")
@example("prod_keyid", "\ud800")
@example("parquet_dir", "s3://\x00")
def test_any_pasted_text_is_accepted_or_refused_in_a_sentence(name: str, text: str) -> None:
    try:
        load(**{name: text})
    except SettingsError as error:
        assert str(error).isprintable()
        assert not str(error).startswith(". ")


def test_a_settings_file_of_another_encoding_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    text = "HOT_RETENTION_DAYS=77\nMARKET_TICKERS=K\u00d6LN-1\n"
    for encoding, reason in (
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-16"),
        ("latin-1", "is not UTF-8"),
    ):
        file.write_bytes(text.encode(encoding))
        with pytest.raises(SettingsError, match=reason) as error:
            load()
        assert str(file) in str(error.value)
        assert "Save it again as UTF-8" in str(error.value)
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        settings = load()
        assert (settings.hot_retention_days, settings.market_tickers) == (77, ("KÖLN-1",))


def test_a_settings_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match="cannot be read"):
        load()


# -- the project's folder --------------------------------------------------------------------------


PACKAGE = Path(platform_settings.__file__).resolve().parent
SHOW = """
from kalshi_platform import settings
project, loaded = settings.project(), settings.load()
print(project.folder, project.found_by, loaded.data_dir, loaded.archive_dir, loaded.market_file, sep="\\n")
"""


def installed(folder: Path, *, checkout: bool) -> Path:
    """The package in a folder of its own: as a checkout, or as a wheel leaves it."""
    folder.mkdir(parents=True)
    names = shutil.ignore_patterns("__pycache__", "benchmarks", "simulator")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=names)
    if checkout:
        for name in ("pyproject.toml", "dagster.yaml", "workspace.yaml"):
            shutil.copy(ROOT / name, folder / name)
    return folder


def shown(installation: Path, cwd: Path, *argv: str, **env: str) -> list[str]:
    """What a program of that installation prints, called from a folder."""
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "HOME"}}
    done = subprocess.run(
        [sys.executable, *(argv or ("-c", SHOW))],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(installation), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout + done.stderr).splitlines()


def test_settings_and_data_are_found_from_every_folder(tmp_path: Path) -> None:
    elsewhere, home = tmp_path / "elsewhere", tmp_path / "home"
    checkout = installed(tmp_path / "a checkout", checkout=True)
    wheel = installed(tmp_path / "site-packages", checkout=False)
    for folder in (elsewhere, home):
        folder.mkdir()
    for folder in (elsewhere, home, checkout):
        (folder / ".env").write_text(
            f"KALSHI_DATA_DIR=./{folder.name[-8:]}\nPARQUET_DIR=../p\nMARKET_FILE=m.txt\n"
        )

    def expected(folder: Path, found_by: str) -> list[str]:
        paths = (folder / folder.name[-8:], folder / ".." / "p", folder / "m.txt")
        return [str(folder), found_by, *map(str, paths)]

    assert shown(checkout, elsewhere) == expected(checkout, "the installation's")
    assert shown(checkout, checkout) == expected(checkout, "the installation's")
    assert shown(wheel, elsewhere) == expected(elsewhere, "the current folder")
    for installation in (checkout, wheel):
        named = expected(home, "KALSHI_HOME")
        assert shown(installation, elsewhere, KALSHI_HOME=str(home)) == named
        here = expected(elsewhere, "KALSHI_HOME")
        assert shown(installation, elsewhere, KALSHI_HOME=".") == here
    lines = shown(checkout, elsewhere, "-m", "kalshi_platform", "doctor", USE_CLICKHOUSE="0")
    assert lines[0] == (
        "✓ settings — recording the simulator, since no PROD_KEYID is set; project folder"
        f" {checkout} (the installation's), .env is read; data in {checkout / 'checkout'}"
    )
    (streamer,) = (line for line in lines if line.startswith("· streamer"))
    assert streamer == f"· streamer — none has run in {checkout / 'checkout'} yet"


def test_a_home_that_is_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KALSHI_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"KALSHI_HOME is '.*nowhere', which is no folder"):
        load()


def test_an_error_says_which_settings_file_was_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOT_RETENTION_DAYS", "soon")
    with pytest.raises(SettingsError, match="which does not exist") as error:
        load()
    (tmp_path / ".env").touch()
    with pytest.raises(SettingsError) as error:
        load()
    assert str(error.value).endswith(f"come from the environment and {tmp_path / '.env'}.")


@pytest.mark.parametrize(
    "name",
    [
        "a%41b",
        "%2e",
        "what?",
        "line\nend",
        "\x1b[31m",
        os.fsdecode(b"\xff"),
        "x" * 200 + "/" + "y" * 200,
    ],
)
def test_a_data_path_that_dagster_cannot_use_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load(kalshi_data_dir=tmp_path / name)
    assert repr(str(tmp_path / name)) in str(error.value)
    assert "Set KALSHI_DATA_DIR" in str(error.value)


@pytest.mark.parametrize("sign", "&<>\\")
def test_a_data_path_that_the_embedded_engine_cannot_use_is_refused(
    sign: str, tmp_path: Path
) -> None:
    data = tmp_path / f"a {sign} b"
    with pytest.raises(SettingsError, match="which the embedded ClickHouse cannot use"):
        load(kalshi_data_dir=data)
    assert load(kalshi_data_dir=data, use_clickhouse=False).data_dir == data


@pytest.mark.parametrize("name", ["KALSHI_DATA_DIR", "PARQUET_DIR", "MARKET_FILE"])
def test_the_home_of_an_unknown_user_is_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "~no-such-user/x")
    with pytest.raises(SettingsError, match=f"{name} is .* does not know"):
        load()


def test_variables_of_settings_are_recognised() -> None:
    ours = ["STREAM_SHARDS", "stream_shards", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"]
    others = ["PATH", "DAGSTER_PG_PASSWORD", "AWS_PROFILE"]
    assert platform_settings.variables([*ours, platform_settings.HOME, *others]) == [
        *ours,
        platform_settings.HOME,
    ]
