"""Every setting of the platform, read from environment variables and from `.env` in the project's folder.

The environment has precedence. The project's folder (`project`) does not depend on the current folder: it is
KALSHI_HOME, else the checkout that the package is installed from (`make install`), else, for a wheel, the
current folder. `.env` is read from it, and relative paths in settings start from it.

Other modules take a `Settings` and never read the environment themselves. `.env.example` documents each
variable; a test compares the two.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kalshi_platform.errors import SettingsError
from kalshi_platform.loopback import is_loopback
from kalshi_platform.printable import invisible_in, strip_invisible

HOME = "KALSHI_HOME"
_OF_A_CHECKOUT = ("pyproject.toml", "dagster.yaml")
PRODUCTION_WS_URL = "wss://external-api-ws.kalshi.com/trade-api/ws/v2"
PRODUCTION_REST_URL = "https://external-api.kalshi.com/trade-api/v2"


@dataclass(frozen=True)
class Project:
    """The folder that settings are relative to."""

    folder: Path
    """Absolute."""
    found_by: str
    """How it was found, as part of a sentence."""

    @property
    def env_file(self) -> Path:
        """The settings file, which need not exist."""
        return self.folder / ".env"


def project() -> Project:
    """Find the project's folder: KALSHI_HOME, else the checkout, else the current folder.

    Returns:
        The folder, and how it was found.

    Raises:
        SettingsError: KALSHI_HOME is no folder.
    """
    if named := os.environ.get(HOME):
        folder = Path(named).expanduser().absolute()
        if not folder.is_dir():
            raise SettingsError(
                f"{HOME} is {named!r}, which is no folder. Give the folder that has .env, or unset it."
            )
        return Project(folder, HOME)
    checkout = Path(__file__).resolve().parents[1]
    if all((checkout / name).is_file() for name in _OF_A_CHECKOUT):
        return Project(checkout, "the installation's")
    return Project(Path.cwd(), "the current folder")


def _from_project(path: Path) -> Path:
    """Make a setting's path absolute. Raises `ValueError` for `~user` of an unknown user."""
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError("begins with the home of a user that this machine does not know") from None
    return path if path.is_absolute() else project().folder / path


@dataclass(frozen=True)
class Exchange:
    """The exchange to connect to, with the API key."""

    ws_url: str
    rest_url: str
    key_id: str
    """The API key's id. It is not a secret by itself, but it is never logged."""
    key_file: Path
    """PEM file of the private key."""
    simulated: bool
    """True for the bundled simulator, which creates its own key file when it starts."""

    def __repr__(self) -> str:  # without the key id, which must not appear in a traceback
        return f"Exchange({self.ws_url!r}, simulated={self.simulated})"


class Settings(BaseSettings):
    """Validated settings. Build with `load()`, which turns a bad value into a `SettingsError`.

    A field is the environment variable of its name in capitals; `.env.example` says what each is for.
    """

    model_config = SettingsConfigDict(env_file_encoding="utf-8-sig", extra="ignore", frozen=True)

    prod_keyid: SecretStr | None = None
    prod_keyfile: Path | None = None
    kalshi_ws_url: str | None = None
    kalshi_rest_url: str | None = None
    market_tickers: Annotated[tuple[str, ...], NoDecode] = ()
    market_file: Path | None = None
    market_series: Annotated[tuple[str, ...], NoDecode] = ()
    market_events: Annotated[tuple[str, ...], NoDecode] = ()
    market_all: bool = False
    market_min_volume: int = Field(0, ge=0)
    """Contracts that a market must have traded before MARKET_ALL records it."""
    stream_shards: int = Field(1, ge=1, le=64)
    """Streamers that divide the markets among them, each with its own connection and journal."""

    use_clickhouse: bool = True
    embedded_clickhouse_port: int = Field(8123, ge=1, le=65_535)
    clickhouse_url: str = Field(
        default_factory=lambda data: f"http://127.0.0.1:{data.get('embedded_clickhouse_port')}"
    )
    clickhouse_user: str = "default"
    clickhouse_password: SecretStr = SecretStr("")
    clickhouse_database: str = Field("kalshi", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    clickhouse_cluster: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Spread the tables over this cluster of the server's configuration; None: a single server."""
    clickhouse_ca_file: Path | None = None
    clickhouse_client_cert_file: Path | None = None
    clickhouse_client_key_file: Path | None = None
    """TLS to ClickHouse: the CA of its certificate, and a client certificate if the server requires one."""
    clickhouse_timeout_seconds: int = Field(120, ge=1)
    """Seconds without data after which a query is abandoned."""
    hot_retention_days: int = Field(30, ge=1, le=36_500)

    kalshi_data_dir: Path = Field(Path("data"), validate_default=True)
    parquet_dir: str | None = None
    s3_endpoint_url: str | None = Field(
        None,
        validation_alias=AliasChoices("s3_endpoint_url", "aws_endpoint_url_s3", "aws_endpoint_url"),
    )
    aws_region: str | None = Field(
        None, validation_alias=AliasChoices("aws_region", "aws_default_region")
    )
    aws_access_key_id: SecretStr | None = None
    aws_secret_access_key: SecretStr | None = None
    aws_session_token: SecretStr | None = None
    archive_begins: date | None = None
    journal_retention_hours: int = Field(48, ge=1)
    keep_frames: bool = True
    frames_retention_days: int = Field(0, ge=0)

    audit_interval_seconds: float = Field(60.0, gt=0)

    dagster_run_retention_days: int = Field(7, ge=1)
    dagster_tick_retention_days: int = Field(7, ge=1)

    dagster_ui_url: str = "http://127.0.0.1:3000"
    alert_slack_webhook_url: SecretStr | None = None
    alert_webhook_url: SecretStr | None = None
    alert_email_to: Annotated[tuple[str, ...], NoDecode] = ()
    alert_email_from: str | None = None
    smtp_host: str | None = None
    smtp_port: int = Field(587, ge=1, le=65_535)
    smtp_security: Literal["starttls", "tls", "none"] = "starttls"
    smtp_user: str | None = None
    smtp_password: SecretStr | None = None
    alert_reminder_hours: float = Field(6.0, gt=0)

    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(None, ge=1, le=65_535)
    """Where `metrics` listens; None: `up` does not start it."""

    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    ch_host: str | None = None
    ch_port: int | None = Field(None, ge=1, le=65_535)
    ch_user: str | None = None
    ch_password: SecretStr | None = None
    ch_database: str | None = None
    ch_secure: bool = False
    """CH_*: defaults of the flags of `qa`; what is unset is taken from CLICKHOUSE_*."""

    simulator_port: int = Field(8765, ge=1, le=65_535)
    simulator_markets: int = Field(40, ge=1)
    simulator_rate: float = Field(200.0, gt=0)
    """Order-book deltas a second, over all simulated markets."""

    @field_validator("*", mode="before")
    @classmethod
    def _without_invisible(cls, value: Any, info: ValidationInfo) -> Any:
        """Strip invisible characters at the ends (of passwords only line ends); refuse them inside."""
        if isinstance(value, tuple):  # a list that was split at commas
            parts = (strip_invisible(part) for part in value)
            return tuple(_refuse_invisible(part) for part in parts if part)
        if not isinstance(value, str):
            return value
        name = str(info.field_name)
        stripped = value.strip("\r\n") if "password" in name else strip_invisible(value)
        # a folder's name may hold invisible joiners, which some scripts need
        return stripped if name.endswith(("_dir", "file")) else _refuse_invisible(stripped)

    @field_validator(
        "prod_keyfile",
        "market_file",
        "clickhouse_ca_file",
        "clickhouse_client_cert_file",
        "clickhouse_client_key_file",
        "kalshi_data_dir",
    )
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        if _KEY_TEXT.search(str(value)):
            raise ValueError(
                "holds a key or certificate itself, and not the path of its file: save it in a file that"
                " this user alone can read (chmod 600), and give the path"
            )
        return None if value is None else _from_project(value)

    @field_validator("prod_keyid")
    @classmethod
    def _is_key_id(cls, value: SecretStr | None) -> SecretStr | None:
        text = "" if value is None else value.get_secret_value()
        for at, character in enumerate(text, 1):
            if not "!" <= character <= "~":
                raise ValueError(
                    f"contains {character!a} (character {at}); a key id has letters, digits and"
                    " hyphens: copy it again from the exchange's page"
                )
        return value

    @field_validator(
        "market_tickers", "market_series", "market_events", "alert_email_to", mode="before"
    )
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator(
        "prod_keyid",
        "prod_keyfile",
        "kalshi_ws_url",
        "kalshi_rest_url",
        "clickhouse_cluster",
        "clickhouse_ca_file",
        "clickhouse_client_cert_file",
        "clickhouse_client_key_file",
        "market_file",
        "parquet_dir",
        "s3_endpoint_url",
        "aws_region",
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "archive_begins",
        "ch_host",
        "ch_port",
        "ch_user",
        "ch_password",
        "ch_database",
        "alert_slack_webhook_url",
        "alert_webhook_url",
        "alert_email_from",
        "smtp_host",
        "smtp_user",
        "smtp_password",
        "metrics_port",
        mode="before",
    )
    @classmethod
    def _blank_is_unset(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("alert_slack_webhook_url", "alert_webhook_url")
    @classmethod
    def _is_webhook(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                parts = urlsplit(value.get_secret_value())
                good = parts.scheme in {"http", "https"} and bool(parts.hostname)
            except ValueError:
                good = False
            if not good:
                raise ValueError("is not a URL such as https://host/path")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("parquet_dir", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("parquet_dir")
    @classmethod
    def _is_place(cls, value: str | None) -> str | None:
        """Accept a folder or s3://bucket/prefix."""
        scheme, separator, place = (value or "").partition("://")
        if not separator and not scheme.lower().startswith("s3:"):
            return str(_from_project(Path(value))) if value else None
        if scheme != "s3":
            raise ValueError("is neither a folder nor s3://bucket/prefix")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#@]*)?", place):
            raise ValueError(
                "is not s3://bucket/prefix; keys and the store's address have settings of their own"
            )
        return value

    @field_validator(
        "clickhouse_url", "kalshi_ws_url", "kalshi_rest_url", "dagster_ui_url", "s3_endpoint_url"
    )
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in {"http", "https", "ws", "wss"} or not parts.hostname:
                raise ValueError("is not a URL such as https://host:port")
            if parts.password is not None or parts.username is not None:
                raise ValueError(
                    "must not carry a user or password; they have settings of their own"
                )
        return value

    @property
    def has_key(self) -> bool:
        """Whether an exchange key is configured; without one the platform records the simulator."""
        return self.prod_keyid is not None

    @property
    def exchange(self) -> Exchange:
        """The exchange to record: the real one if a key is configured, else the simulator."""
        if self.prod_keyid is not None and self.prod_keyfile is not None:
            return Exchange(
                ws_url=self.kalshi_ws_url or PRODUCTION_WS_URL,
                rest_url=self.kalshi_rest_url or PRODUCTION_REST_URL,
                key_id=self.prod_keyid.get_secret_value(),
                key_file=self.prod_keyfile,
                simulated=False,
            )
        base = f"127.0.0.1:{self.simulator_port}/trade-api"
        return Exchange(
            ws_url=self.kalshi_ws_url or f"ws://{base}/ws/v2",
            rest_url=self.kalshi_rest_url or f"http://{base}/v2",
            key_id="simulator",
            key_file=self.data_dir / "simulator" / "key.pem",
            simulated=True,
        )

    @property
    def names_markets(self) -> bool:
        """Whether any MARKET_ setting selects markets."""
        named = self.market_tickers or self.market_file or self.market_series or self.market_events
        return bool(named) or self.market_all

    @property
    def every_market(self) -> bool:
        """Whether all markets are recorded: with MARKET_ALL, or on the simulator without a selection."""
        return self.market_all or (self.exchange.simulated and not self.names_markets)

    @property
    def data_dir(self) -> Path:
        """The folder of all local data, absolute."""
        return self.kalshi_data_dir

    @property
    def archive_dir(self) -> Path:
        """Root of a local archive, absolute; for one on object storage, of the files not yet uploaded."""
        if self.archive_base is not None:
            return self.data_dir / "outbox"
        return Path(self.parquet_dir or self.data_dir / "parquet")

    @property
    def archive_base(self) -> str | None:
        """`bucket/prefix` of an archive on object storage; None for one on a local disk."""
        scheme, _, place = (self.parquet_dir or "").partition("://")
        return "/".join(piece for piece in place.split("/") if piece) if scheme == "s3" else None

    @property
    def archive_url(self) -> str:
        """The archive's address for readers: an absolute path, or s3://bucket/prefix."""
        return f"s3://{self.archive_base}" if self.archive_base else str(self.archive_dir)

    @property
    def hot_retention_given(self) -> bool:
        """Whether HOT_RETENTION_DAYS was set; the default never shortens a table's retention."""
        return "hot_retention_days" in self.model_fields_set

    @property
    def embedded_clickhouse(self) -> bool:
        """Whether the embedded ClickHouse is used, which `up` then starts."""
        return (
            self.use_clickhouse
            and self.clickhouse_url == f"http://127.0.0.1:{self.embedded_clickhouse_port}"
        )

    @property
    def embedded_clickhouse_dir(self) -> Path:
        """Data folder of the embedded ClickHouse that `up` starts."""
        return self.data_dir / "clickhouse"

    @property
    def object_store_urls(self) -> tuple[str, ...]:
        """URL prefixes of the archive's bucket, by path and by host name; empty for a local archive."""
        if self.archive_base is None:
            return ()
        bucket = self.archive_base.partition("/")[0]
        if self.s3_endpoint_url is not None:
            endpoints = [self.s3_endpoint_url.rstrip("/")]
        else:
            regions = [""] if self.aws_region is None else ["", f".{self.aws_region}"]
            endpoints = [f"https://s3{region}.amazonaws.com" for region in regions]
        by_path = [f"{endpoint}/{bucket}/" for endpoint in endpoints]
        by_name = [f"{endpoint.replace('://', f'://{bucket}.', 1)}/" for endpoint in endpoints]
        return (*by_path, *by_name)

    @property
    def stores(self) -> frozenset[str]:
        """Names of the stores that the journals are loaded into."""
        return frozenset({"parquet", "clickhouse"} if self.use_clickhouse else {"parquet"})

    @property
    def journals_dir(self) -> Path:
        """The folder of all shards' journals."""
        return self.data_dir / "journal"

    def journal_dir(self, shard: int = 0) -> Path:
        """Name the folder of one shard's journal.

        Args:
            shard: The shard, from 0.

        Returns:
            An absolute path; the folder need not exist.
        """
        return self.journals_dir / f"shard-{shard}"


def load(**overrides: Any) -> Settings:
    """Read the settings from the environment and `.env`.

    Args:
        **overrides: Fields that have precedence over both.

    Returns:
        The settings, checked together.

    Raises:
        SettingsError: A value is missing or makes no sense; the sentence names the variable and the remedy.
    """
    env_file = project().env_file
    _require_text(env_file)
    try:
        settings = Settings(**{"_env_file": env_file, **overrides})
    except ValidationError as error:
        sentence = _sentence(error)  # and no cause: it holds the values, which may be secret
        raise SettingsError(f"{sentence} {_where_from(env_file)}") from None
    _require_usable(settings.data_dir, for_clickhouse=settings.embedded_clickhouse)
    if (settings.prod_keyid is None) != (settings.prod_keyfile is None):
        missing = "PROD_KEYFILE" if settings.prod_keyfile is None else "PROD_KEYID"
        raise SettingsError(
            f"{missing} is not set: the exchange needs both PROD_KEYID and PROD_KEYFILE."
            " Set both to record the exchange, or neither to use the simulator."
        )
    if settings.has_key:
        _require_tls(settings)
    if (settings.clickhouse_client_cert_file is None) != (
        settings.clickhouse_client_key_file is None
    ):
        raise SettingsError(
            "CLICKHOUSE_CLIENT_CERT_FILE and CLICKHOUSE_CLIENT_KEY_FILE belong together: set both or neither."
        )
    if not settings.clickhouse_url.startswith("https:") and (
        settings.clickhouse_ca_file or settings.clickhouse_client_cert_file
    ):
        raise SettingsError(
            f"CLICKHOUSE_URL is {settings.clickhouse_url!r}, which is not encrypted, but certificates for"
            " it are set. Give https://…, or unset CLICKHOUSE_CA_FILE and CLICKHOUSE_CLIENT_CERT_FILE."
        )
    if settings.alert_email_to:
        for name in ("smtp_host", "alert_email_from"):
            if getattr(settings, name) is None:
                raise SettingsError(
                    f"{name.upper()} is not set: ALERT_EMAIL_TO needs a mail server to send by and an"
                    " address to send from. Set both SMTP_HOST and ALERT_EMAIL_FROM."
                )
    if settings.market_min_volume and not settings.market_all:
        raise SettingsError(
            f"MARKET_MIN_VOLUME is {settings.market_min_volume}, but it is the floor of MARKET_ALL, which"
            " is not set. Set MARKET_ALL=1 or take the floor out. See .env.example."
        )
    if (settings.aws_access_key_id is None) != (settings.aws_secret_access_key is None):
        raise SettingsError(
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together: set both, or neither to have"
            " the key found as Amazon's tools find it."
        )
    return settings


@functools.cache
def current() -> Settings:
    """Read the settings once, for the whole process.

    Returns:
        The same settings at every call.

    Raises:
        SettingsError: As of `load`.
    """
    return load()


def variables(names: Iterable[str]) -> list[str]:
    """Find the names that are variables of a setting.

    Args:
        names: Names of environment variables; case is ignored.

    Returns:
        Those of them that a setting has.
    """
    known = {HOME.lower()}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        aliases = alias.choices if isinstance(alias, AliasChoices) else (name,)
        known |= {str(choice) for choice in aliases}
    return [name for name in names if name.lower() in known]


def secrets_in_file() -> list[str]:
    """Find the variables in `.env` that hold a secret.

    Returns:
        Their names, sorted; empty if the file does not exist.
    """
    secret = {
        name
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *get_args(field.annotation))
    }
    return sorted(
        n
        for n, value in dotenv_values(project().env_file, encoding="utf-8-sig").items()
        if value and n.lower() in secret
    )


def _where_from(env_file: Path) -> str:
    missing = "" if env_file.is_file() else ", which does not exist"
    return f"Settings come from the environment and {env_file}{missing}."


MOST_PATH_BYTES = 400
"""Limit of the data folder's path: SQLite, which holds Dagster's runs, opens no path of 512 bytes."""
_UNUSABLE = re.compile(r"%[0-9A-Fa-f]{2}|[?\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that Dagster's storage misreads in the URL it builds from a path, or that are invisible."""


def _require_usable(data_dir: Path, *, for_clickhouse: bool) -> None:
    """Refuse a data folder whose path would make Dagster, SQLite or ClickHouse fail obscurely later."""
    text = str(data_dir)
    found, size = _UNUSABLE.search(text), len(os.fsencode(data_dir))
    sign = re.search(r"[&<>\\]", text)
    if found is not None:
        fault = f"has {found[0]!a} in its path, which Dagster's storage cannot use"
    elif for_clickhouse and sign is not None:
        fault = f"has {sign[0]!r} in its path, which the embedded ClickHouse cannot use"
    elif size > MOST_PATH_BYTES:
        fault = f"is {size} bytes long, and SQLite cannot open files in a folder of more than {MOST_PATH_BYTES}"
    else:
        return
    raise SettingsError(
        f"The data folder {text!r} {fault}. Set KALSHI_DATA_DIR to another folder, or rename that one."
    )


def _refuse_invisible(text: str) -> str:
    if (found := invisible_in(text)) is not None:
        raise ValueError(f"contains {found}, which no editor shows: type it again, or copy less")
    return text


def _require_text(env_file: Path) -> None:
    """Refuse a settings file that is not UTF-8: parts of it would be ignored silently."""
    try:
        content = env_file.read_bytes()
        content.decode("utf-8-sig")
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingsError(
            f"{env_file.absolute()} cannot be read ({error.strerror}). Make it a file that this user can"
            " read: chmod 600, or chown."
        ) from None
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} is not UTF-8"
    else:
        if b"\0" not in content:
            return
        fault = "it has NUL bytes"
    if content[:2] in {b"\xff\xfe", b"\xfe\xff"} or b"\0" in content:
        fault = f"{fault}; it looks like UTF-16, which Windows' editors call Unicode"
    raise SettingsError(
        f"{env_file.absolute()} is not UTF-8 text ({fault}). Save it again as UTF-8."
    )


def _require_tls(settings: Settings) -> None:
    """Refuse to send signed requests in the clear: an observer could replay a signature while it is valid."""
    exchange = settings.exchange
    for name, url in (("KALSHI_WS_URL", exchange.ws_url), ("KALSHI_REST_URL", exchange.rest_url)):
        parts = urlsplit(url)
        if parts.scheme not in {"https", "wss"} and not is_loopback(parts.hostname or ""):
            raise SettingsError(
                f"{name} is {url!r}: a key is set, and without TLS an observer on the network could replay"
                f" signed requests. Give a {'wss' if name == 'KALSHI_WS_URL' else 'https'}:// address, or"
                " unset PROD_KEYID and PROD_KEYFILE if it is a simulator."
            )


_KEY_TEXT = re.compile(r"-----BEGIN |^(?:MII|MC4C)[A-Za-z0-9+/=\s\\]{57,}$")
"""Content of a PEM file, with or without its first line."""
_SECRET = ("PASSWORD", "KEY", "TOKEN", "WEBHOOK")
"""Parts of the names of settings whose value is never shown in an error."""


def _sentence(error: ValidationError) -> str:
    """A validation error as one sentence per setting, without secret values."""

    def one(item: Any) -> str:
        name = str(item["loc"][0]).upper() if item["loc"] else "settings"
        reason = str(item["msg"]).removeprefix("Value error, ")
        value = item.get("input")
        secret = (
            any(word in name for word in _SECRET)
            or bool({"@", "?"} & set(str(value)))
            or _KEY_TEXT.search(str(value)) is not None
        )
        shown = "" if secret else f" is {value!r}:"
        return f"{name}{shown} {reason}"

    own = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    return "; ".join(map(one, own)) + ". See .env.example."
