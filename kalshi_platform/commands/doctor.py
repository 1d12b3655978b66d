"""`doctor`: check everything that the platform needs, and print a remedy for each fault.

The checks run in parallel, each with a deadline, and change nothing. How a fault is recognised belongs to the
room that owns the thing; here are the lines and their order.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import ObjectArchive, open_archive, watermarks
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import (
    MINIMUM_VERSION,
    Client,
    connect,
    ping,
    server_version,
)
from kalshi_platform.clickhouse.migrations import State
from kalshi_platform.commands.announcements import IN_A_ROW
from kalshi_platform.embedded_clickhouse import write_password
from kalshi_platform.embedded_clickhouse.parts import SET_ASIDE
from kalshi_platform.embedded_clickhouse.refused import FOLDER
from kalshi_platform.errors import PlatformError, SettingsError, StoreError
from kalshi_platform.exchange.connection import LiveConnection, dial
from kalshi_platform.exchange.errors import ExchangeError, Unreachable
from kalshi_platform.exchange.rest import COST_OF_GET, RestClient
from kalshi_platform.exchange.signing import Credentials, accessible_to_others, load_signer
from kalshi_platform.health import channels, health_report, monitored_shards, supervision, verdict
from kalshi_platform.health.metrics import channel_troubles
from kalshi_platform.health.outbox import deliver_in_time
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.loading import presence
from kalshi_platform.printable import printable
from kalshi_platform.recorder.market_selection import selection_of
from kalshi_platform.settings import Settings

if TYPE_CHECKING:
    from kalshi_platform.health.growth import Growth

SKEW_BAD_S, SKEW_ODD_S = 5.0, 2.0
"""Clock skew in seconds: the exchange refuses signatures about 10 s off; the measurement is exact to a second."""
LINE_S = 20.0
"""Seconds for a check, counted from the end of the check it depends on; imports are not included."""
_HEAVY = ("kalshi_platform.orchestration.host.daemon", "kalshi_platform.health.growth")
"""Modules that take seconds to import on a busy machine: Dagster and Arrow."""
FREE_BAD_BYTES, FREE_ODD_BYTES = 1 << 30, 10 << 30
GIB = 1 << 30
FOREIGN_SHOWN = 8
SPOOLED_ODD_S = 60.0
"""Age of a spooled file from which it is reported: a market maker sends once a second."""
FULL_BAD_DAYS, FULL_ODD_DAYS = 3.0, 30.0
IN_HOURS_DAYS = 2.0
_START = "start it (make run, or kalshi-platform stream)"
_CHANNELS = "set ALERT_SLACK_WEBHOOK_URL, ALERT_WEBHOOK_URL or ALERT_EMAIL_TO"


class Mark(Enum):
    """How a finding is printed; only BAD fails the run."""

    GOOD = "✓"
    ODD = "!"
    BAD = "✗"
    SKIPPED = "·"


@dataclass(frozen=True)
class Finding:
    """The result of a check, and its remedy."""

    mark: Mark
    text: str
    remedy: str = ""

    def line(self, name: str) -> str:
        """The finding on a line of its own."""
        parts = (f"{self.mark.value} {name}", self.text, self.remedy)
        return printable(" — ".join(part for part in parts if part))


Check = tuple[Callable[[Settings], Finding], str | None]
"""A check, and the name of the check that it depends on."""


@click.command()
@click.option("--test-alert", is_flag=True, help="Send a test message to every alert channel, too.")
def command(*, test_alert: bool) -> None:
    """Check settings, key, exchange, ClickHouse, disk and growth, streamer, Dagster, alerts, metrics.

    Prints a line for each. Exits 1 if any of them is wrong. Nothing is changed.
    """
    failed = False
    for name, finding in run_checks():
        click.echo(finding.line(name))
        failed |= finding.mark is Mark.BAD
    if test_alert:
        for name, finding in send_test_alerts():
            click.echo(finding.line(name))
            failed |= finding.mark is Mark.BAD
    if failed:
        raise SystemExit(1)


def send_test_alerts() -> Iterator[tuple[str, Finding]]:
    """Send a test message to each configured channel."""
    try:
        targets = channels.configured(platform_settings.current())
    except SettingsError:
        return  # `run_checks` reports it
    if not targets:
        yield "test alert", Finding(Mark.BAD, "no channel is set", _CHANNELS)
    for channel in targets:
        name = f"test alert, {channel.name}"
        try:
            deliver_in_time(channel, channels.trial(time.time()))
        except PlatformError as error:
            yield name, Finding(Mark.BAD, str(error))
        else:
            yield name, Finding(Mark.GOOD, "was accepted; see that it arrived")


def run_checks() -> Iterator[tuple[str, Finding]]:
    """Every check's name and finding, in the order of `CHECKS`: a check after those that it depends on."""
    try:
        settings = platform_settings.current()
    except SettingsError as error:
        yield "settings", Finding(Mark.BAD, str(error))
        return
    yield "settings", _settings(settings)
    try:
        checks = _checks(settings)
    except PlatformError as error:
        yield "journals", Finding(Mark.BAD, str(error))
        checks = dict(CHECKS)
    for module in _HEAVY:
        importlib.import_module(module)
    found = _start_checks(settings, checks)
    limit = time.monotonic() + LINE_S
    for name, (_, depends_on) in checks.items():
        until = limit + LINE_S if depends_on in found else limit
        try:
            yield name, found[name].result(max(until - time.monotonic(), 0.0))
        except TimeoutError:
            yield (
                name,
                Finding(Mark.BAD, f"did not end within {LINE_S:.0f} s", "see that it answers"),
            )


def _start_checks(settings: Settings, checks: Mapping[str, Check]) -> dict[str, Future[Finding]]:
    """Start every check in a daemon thread, so that one that hangs delays neither another's line nor the exit."""
    found: dict[str, Future[Finding]] = {name: Future() for name in checks}
    for name, (check, depends_on) in checks.items():
        basis = (depends_on, found[depends_on]) if depends_on in found else None
        run = functools.partial(_run_check, found[name], check, settings, basis)
        threading.Thread(target=run, name=f"doctor: {name}", daemon=True).start()
    return found


def _run_check(
    finding: Future[Finding],
    check: Callable[[Settings], Finding],
    settings: Settings,
    basis: tuple[str, Future[Finding]] | None,
) -> None:
    """Run a check after the check that it depends on; skip it if that one failed."""
    if basis is not None:
        name, prerequisite = basis
        try:
            is_good = prerequisite.result(LINE_S).mark not in {Mark.BAD, Mark.SKIPPED}
        except TimeoutError:
            is_good = False
        if not is_good:
            finding.set_result(Finding(Mark.SKIPPED, f"not checked: see {name}"))
            return
    try:
        finding.set_result(check(settings))
    except PlatformError as error:
        finding.set_result(Finding(Mark.BAD, str(error)))
    except Exception as error:  # noqa: BLE001 - a bug in one check must not hide the other lines
        finding.set_result(Finding(Mark.BAD, f"could not be checked ({error!r})"))


def _settings(settings: Settings) -> Finding:
    """What is recorded, the project's folder, and whether `.env` is closed to other users."""
    source = "the exchange" if settings.has_key else "the simulator, since no PROD_KEYID is set"
    project = platform_settings.project()
    env = ".env is read" if project.env_file.is_file() else "it has no .env"
    text = (
        f"recording {source}; project folder {project.folder} ({project.found_by}), {env}; data in"
        f" {settings.data_dir}"
    )
    secret = platform_settings.secrets_in_file()
    if secret and accessible_to_others(project.env_file.stat().st_mode):
        exposed = f"{text}; other users of this machine can read {', '.join(secret)} in .env"
        return Finding(Mark.ODD, exposed, f"chmod 600 {project.env_file}")
    return Finding(Mark.GOOD, text)


def _key_file(settings: Settings) -> Finding:
    """Whether the private key is readable and closed to other users."""
    if not settings.has_key:
        return Finding(
            Mark.SKIPPED, "PROD_KEYID and PROD_KEYFILE are not set: the simulator has its own"
        )
    path = settings.exchange.key_file
    load_signer(path)  # refuses a file that others can read if this user may change its mode
    if accessible_to_others(path.stat().st_mode):
        return Finding(
            Mark.ODD,
            f"{path} holds a private key, and other users of this machine can read it",
            "have its owner close it (chmod 600), or mount the secret with mode 0400",
        )
    return Finding(Mark.GOOD, f"{path} holds a private key")


def _clock(settings: Settings) -> Finding:
    """The difference between this machine's clock and the exchange's."""
    with RestClient(settings.exchange, signed=False, attempts=1) as client:
        with suppress(ExchangeError):
            # a refusal has a Date header too; an unreachable exchange is reported by the next check
            client.status()
        skew_s = client.clock_skew_s
    if skew_s is None:
        return Finding(Mark.SKIPPED, "cannot be compared without the exchange")
    text = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the exchange's, to within a second"
    mark = Mark.BAD if abs(skew_s) > SKEW_BAD_S else Mark.ODD
    if abs(skew_s) > SKEW_ODD_S:
        return Finding(mark, text, "set it by NTP (timedatectl set-ntp true)")
    return Finding(Mark.GOOD, text)


def _rest(settings: Settings) -> Finding:
    """Whether the exchange's REST interface accepts the key, and whether it trades."""
    exchange = settings.exchange
    try:
        with RestClient(exchange, signed=False, attempts=2) as client:
            status = client.status()
    except Unreachable:
        if not exchange.simulated:
            raise
        return Finding(
            Mark.BAD,
            f"no key is set, and the simulator does not run at {exchange.rest_url}",
            "start it (kalshi-platform simulate; make run does), or set PROD_KEYID and PROD_KEYFILE",
        )
    with RestClient(exchange, attempts=2) as client:
        limits = client.account_limits()
    rate = limits.read.refill_rate / COST_OF_GET
    text = f"{exchange.rest_url} accepts the key; {rate:.0f} requests a second"
    if not status.exchange_active:
        return Finding(Mark.ODD, f"{text}; the exchange says that it is closed", "wait for it")
    return Finding(Mark.GOOD, f"{text}; trading {'goes on' if status.trading_active else 'pauses'}")


def _websocket(settings: Settings) -> Finding:
    """Whether the exchange's WebSocket accepts the key."""
    exchange = settings.exchange
    credentials = Credentials(exchange.key_id, load_signer(exchange.key_file))

    async def handshake() -> None:
        connection = await dial(exchange.ws_url, credentials, LiveConnection)
        await connection.close()

    asyncio.run(handshake())
    return Finding(Mark.GOOD, f"{exchange.ws_url} accepts the key")


def _markets(settings: Settings) -> Finding:
    """Whether the selected markets, series and events exist."""
    if not settings.names_markets and settings.exchange.simulated:
        return Finding(Mark.GOOD, "all of the simulator's")
    if not settings.names_markets:
        return Finding(
            Mark.BAD,
            "there is nothing to record",
            "set MARKET_SERIES (for example MARKET_SERIES=KXHIGHNY), MARKET_EVENTS, MARKET_TICKERS,"
            " MARKET_FILE or MARKET_ALL",
        )
    wish = selection_of(settings)
    with RestClient(settings.exchange, attempts=2) as client:
        unknown = sorted(client.unknown_tickers(wish.tickers))
        open_now = {
            client.series(name).ticker: len(client.open_markets(name)) for name in wish.series
        }
        by_event = {name: len(client.markets(event_ticker=name)) for name in sorted(wish.events)}
    unknown += [name for name, count in by_event.items() if not count]
    if unknown:
        return Finding(
            Mark.BAD,
            f"the exchange knows no {', '.join(unknown)}",
            "correct MARKET_TICKERS, MARKET_FILE or MARKET_EVENTS: as in the address of a market's page,"
            " in capitals",
        )
    parts = ["all of the exchange's"] if wish.everything else []
    parts += [f"{len(wish.tickers)} tickers, all known"] if wish.tickers else []
    parts += [f"{name}: {count} open" for name, count in open_now.items()]
    parts += [f"{name}: {count} markets" for name, count in by_event.items()]
    return Finding(Mark.GOOD, "; ".join(parts))


def _clickhouse(settings: Settings) -> Finding:
    """Whether ClickHouse answers, its version, and what the embedded one has set aside."""
    if not settings.use_clickhouse:
        return Finding(Mark.SKIPPED, "USE_CLICKHOUSE is 0: Parquet only")
    ping(settings)  # fails soon if the server accepts connections but never answers
    with closing(connect(settings, database=False, log_comment="doctor")) as client:
        version = server_version(client)
        cluster = _cluster(client, settings.clickhouse_cluster)
    text = f"{settings.clickhouse_url} answers, version {version[0]}.{version[1]}{cluster}"
    if version < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        return Finding(Mark.BAD, text, f"the platform needs {wanted} or newer: upgrade it")
    if _lacks_password(settings):
        return Finding(
            Mark.BAD,
            f"{text}; the password that writing needs, {settings.embedded_clickhouse_dir / write_password.NAME},"
            " is gone",
            "start the embedded ClickHouse again, which makes a new one",
        )
    if aside := _refused(settings):
        return Finding(
            Mark.ODD,
            f"{text}; an older version let in, and the server has taken out of the database: {aside}",
            "their first lines say why; make them on a ClickHouse server, if they are needed, and remove the files",
        )
    if spoiled := _spoiled(settings):
        return Finding(
            Mark.ODD,
            f"{text}; parts of tables that a failed write had spoiled were set aside: {spoiled}",
            "once kalshi-platform proof says that no row is missing, delete them",
        )
    return Finding(Mark.GOOD, text)


def _lacks_password(settings: Settings) -> bool:
    """Whether the embedded ClickHouse was used before and its password file is missing."""
    given = settings.clickhouse_password.get_secret_value()
    folder = settings.embedded_clickhouse_dir
    return (
        settings.embedded_clickhouse
        and not given
        and (folder / "engine").exists()
        and write_password.read(folder) is None
    )


def _refused(settings: Settings) -> str:
    """Definitions that the embedded ClickHouse set aside when it started."""
    if not settings.embedded_clickhouse:
        return ""
    return _some((settings.embedded_clickhouse_dir / FOLDER).rglob("*.sql"))


def _spoiled(settings: Settings) -> str:
    """Parts of tables that the embedded ClickHouse set aside when it started."""
    if not settings.embedded_clickhouse:
        return ""
    tables = settings.embedded_clickhouse_dir / "engine" / "store"
    return _some(tables.glob(f"*/*/detached/{SET_ASIDE}*"))


def _some(paths: Iterable[Path]) -> str:
    found = sorted(str(path) for path in islice(paths, FOREIGN_SHOWN + 1))
    return ", ".join(found[:FOREIGN_SHOWN]) + (", …" if len(found) > FOREIGN_SHOWN else "")


def _cluster(client: Client, name: str | None) -> str:
    """The size of the cluster, as the end of a sentence; empty for a single server."""
    if name is None:
        return ""
    shards, hosts = migrations.size_of(client, name)
    return f"; cluster {name}: {shards} shards on {hosts} hosts"


def _schema(settings: Settings) -> Finding:
    """Whether every migration is applied and the tables match the schema."""
    with closing(connect(settings, log_comment="doctor")) as client:
        standing = migrations.standing(client)
        lacking = [str(migration) for migration in standing if migration.state is State.PENDING]
        changed = [str(migration) for migration in standing if migration.state is State.CHANGED]
        different = [] if lacking else migrations.differences(client)
    database = settings.clickhouse_database
    if lacking:
        return Finding(
            Mark.BAD, f"{database} lacks {', '.join(lacking)}", "run kalshi-platform migrate"
        )
    if changed or different:
        text = "; ".join(
            [
                *(f"{migration} was changed after it was applied" for migration in changed),
                *different,
            ]
        )
        return Finding(
            Mark.BAD,
            f"{database}: {text}",
            "restore a migration that you changed; else run kalshi-platform migrate, which says what to do",
        )
    return Finding(Mark.GOOD, f"{database} has all {len(standing)} migrations")


def _data_folder(settings: Settings) -> Finding:
    return _disk(settings.data_dir, "KALSHI_DATA_DIR")


def _archive(settings: Settings) -> Finding:
    """Whether the archive belongs to this recorder and can be written."""
    archive = open_archive(settings)
    try:
        presence.known_archive(settings)
        if isinstance(archive, ObjectArchive):
            archive.probe()
            return Finding(Mark.GOOD, f"{archive} can be written and read")
    except StoreError as error:
        return Finding(Mark.BAD, str(error))
    return _disk(settings.archive_dir, "PARQUET_DIR")


def _foreign(settings: Settings) -> Finding:
    """Files in the platform's folders that are not the platform's."""
    from kalshi_platform.quality import foreign_files  # loads Arrow

    found = [
        *islice(foreign_files.in_archive(settings), FOREIGN_SHOWN + 1),
        *islice(foreign_files.in_data_folder(settings), FOREIGN_SHOWN + 1),
    ]
    if not found:
        return Finding(Mark.GOOD, "none among the platform's own")
    shown = ", ".join(found[:FOREIGN_SHOWN]) + (", …" if len(found) > FOREIGN_SHOWN else "")
    return Finding(
        Mark.ODD,
        f"not the platform's, and ignored: {shown}",
        "move them elsewhere: a reader that globs the archive takes theirs for recorded rows",
    )


def _spool(settings: Settings) -> Finding:
    """The market maker's rows that ClickHouse does not have yet."""
    from kalshi_platform.inventory import spool  # loads Arrow

    folder = spool.folder_of(settings)
    try:
        if not folder.is_dir():
            return Finding(Mark.SKIPPED, "no market maker has written here")
        refused = spool.refused_in(folder)
        waiting, age_s = spool.oldest_in(folder)
    except OSError as error:
        return Finding(
            Mark.BAD,
            f"{folder} cannot be read ({error.strerror})",
            "make it readable for this user",
        )
    behind = (
        f"{waiting:,} files wait, the oldest for {age_s:,.0f} s" if waiting else "nothing waits"
    )
    if refused.files:
        sentence = spool.said_of(refused, folder).rstrip(".")
        return Finding(Mark.ODD, f"{sentence}; {behind}", spool.REMEDY)
    if age_s > SPOOLED_ODD_S:
        remedy = "start the market maker: it sends them, and its log says what keeps it from that"
        return Finding(Mark.ODD, f"{behind} in {folder}", remedy)
    return Finding(Mark.GOOD, behind)


def _market_maker(settings: Settings) -> Finding:
    """Whether every engine that has decided still decides: the asset check `decisions_fresh`, run now."""
    from kalshi_platform.inventory import audit, judged  # loads Arrow

    parameters = audit.Parameters(limit=1)
    with closing(connect(settings, log_comment="doctor")) as client:
        start = audit.since(client, parameters)
        looked_at = judged.look(client, parameters, start, paper=not settings.has_key)
    if not looked_at.engines:
        never = f"no engine has decided in the last {judged.RETIRED.days} days"
        return Finding(
            Mark.SKIPPED, (looked_at.tables.why_not(audit.DECISIONS) or never).rstrip(".")
        )
    if looked_at.stopped:
        return Finding(
            Mark.BAD,
            "; ".join(judged.silence(engine) for engine in looked_at.stopped),
            "start it, or see in its log why it does not decide; the spool's line counts the rows that wait here",
        )
    if looked_at.ahead:
        return Finding(
            Mark.BAD,
            "; ".join(judged.lead(engine) for engine in looked_at.ahead),
            "set its machine's clock by NTP (timedatectl set-ntp true)",
        )
    return Finding(Mark.GOOD, f"it decides: {looked_at.in_words()}")


def _disk(folder: Path, variable: str) -> Finding:
    """Whether a folder can be written, and its free space."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
            probe.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        remedy = f"make room or make it writable, or set {variable} to another folder"
        return Finding(Mark.BAD, f"{existing} cannot be written ({error.strerror})", remedy)
    text = f"{folder} has {free / (1 << 30):.1f} GiB free"
    if free < FREE_ODD_BYTES:
        mark = Mark.BAD if free < FREE_BAD_BYTES else Mark.ODD
        return Finding(mark, text, f"make room, or set {variable} to a larger disk")
    return Finding(Mark.GOOD, text)


def _streamer(settings: Settings, shard: int = 0) -> Finding:
    """The state of a shard's streamer and of its journal's identity."""
    finding = _reported(settings, shard)
    try:
        journal_identity.read(settings.journal_dir(shard))
    except JournalError as error:
        return Finding(
            Mark.BAD,
            f"{finding.text}; {str(error).removesuffix('.')}",
            f"{_START}: it recovers the file if the journal proves its content, and else says what to do",
        )
    return finding


def _reported(settings: Settings, shard: int) -> Finding:
    """The finding of a shard's health report."""
    folder = settings.journal_dir(shard)
    path = folder / health_report.FILE
    try:
        report = health_report.read(folder)
        if report is None:
            return _unreported(settings, shard)
        finding = _judge(report, shard, settings.stream_shards)
        return replace(finding, text=f"{finding.text}{_supervised(settings, shard)}")
    except OSError as error:
        return Finding(Mark.BAD, f"{path} cannot be read ({error.strerror})", "make it readable")
    except (ValueError, KeyError, TypeError) as error:
        return Finding(
            Mark.BAD,
            f"{path} is not a streamer's report ({error!r})",
            "remove it; a running streamer writes it each second",
        )


def _unreported(settings: Settings, shard: int) -> Finding:
    """The finding of a shard without a report."""
    if shard >= settings.stream_shards:
        return Finding(Mark.ODD, verdict.left_over(None, shard, datetime.now(UTC)).sentence)
    if watermarks.shards(settings.journals_dir):
        return Finding(
            Mark.ODD,
            "none has run here yet: its share of the markets is not recorded",
            f"run kalshi-platform stream --shard {shard} (streamer_supervisor does that)",
        )
    noted = supervision.read(settings.data_dir)
    if noted is not None and noted.ticking:
        text = (
            f"none runs, and none has run in {settings.data_dir} yet{_supervised(settings, shard)}"
        )
        return Finding(Mark.BAD, text, "see the last runs of stream_orderbook in the UI")
    return Finding(Mark.SKIPPED, f"none has run in {settings.data_dir} yet")


def _supervised(settings: Settings, shard: int) -> str:
    """The supervisor's reason if a shard's runs fail repeatedly, as the end of a sentence; else empty."""
    noted = supervision.read(settings.data_dir)
    decision = noted.shards.get(shard) if noted is not None and noted.ticking else None
    if decision is None or decision.failures < IN_A_ROW:
        return ""
    return f"; {decision.failures} runs in a row have failed, the last: {decision.why} {decision.reason}"


def _judge(report: Mapping[str, Any], shard: int, configured: int) -> Finding:
    """The finding of a streamer's report: every fault, the worst first."""
    now = datetime.now(UTC)
    judged = verdict.judge_shard(report, shard, configured, None, now, profile=verdict.DOCTOR)
    wrong = [
        judgement.sentence for judgement in judged if judgement.verdict is not verdict.Verdict.GOOD
    ]
    details = (
        f"{report['state']!s}; last frame {_age_text(report, 'last_frame_ns', now)}, last durable write"
        f" {_age_text(report, 'last_durable_ns', now)}, {int(report['lag_frames']):,} frames not loaded yet"
    )
    mark = _MARKS[judged[0].verdict]
    trouble = str(report["trouble"] or "")
    if trouble and trouble not in " ".join(wrong):
        wrong, mark = [trouble, *wrong], Mark.BAD
    markets, synced = int(report["markets"]), int(report["synced"])
    if 0 < synced < markets:
        wrong.append(
            f"{synced:,} of {markets:,} books are synced; the others follow within a minute."
        )
        mark = Mark.ODD if mark is Mark.GOOD else mark
    return Finding(mark, " ".join([*wrong, f"({details})"]) if wrong else details)


_MARKS = {
    verdict.Verdict.GOOD: Mark.GOOD,
    verdict.Verdict.WARN: Mark.ODD,
    verdict.Verdict.ERROR: Mark.BAD,
}


def _age_text(report: Mapping[str, Any], key: str, now: datetime) -> str:
    at = int(report[key])
    return f"{now.timestamp() - at / 1e9:.0f} s ago" if at else "never"


def _growth(settings: Settings) -> Finding:
    """The sizes of the stored data, and when the data folder's disk is full at the current rate."""
    from kalshi_platform.health import growth  # loads Arrow

    found = growth.measure(settings)
    stores = ("Parquet archive", *(("ClickHouse",) if settings.use_clickhouse else ()))
    unreachable = sorted(set(stores) - {item.name for item in found})
    sizes = "; ".join(
        [
            *(_growth_text(item) for item in found if item.bytes or item.per_day),
            *(f"{store} cannot be reached" for store in unreachable),
        ]
    )
    if not any(item.per_day for item in found):
        return Finding(
            Mark.SKIPPED, "; ".join(filter(None, (sizes, "too young for a growth rate")))
        )
    here = [item for item in found if growth.on_disk_of(item, settings.data_dir)]
    days = growth.days_until_full(here, growth.free_bytes(settings.data_dir))
    if days is None or days > 365:
        return Finding(Mark.GOOD, f"{sizes}; the disk lasts for more than a year")
    span = f"{days:.0f} days" if days >= IN_HOURS_DAYS else f"{days * 24:.0f} hours"
    text = f"{sizes}; the disk is full in {span}"
    remedy = "see docs/operations.md, What is kept how long"
    if days < FULL_ODD_DAYS:
        return Finding(Mark.BAD if days < FULL_BAD_DAYS else Mark.ODD, text, remedy)
    return Finding(Mark.GOOD, text)


def _growth_text(item: Growth) -> str:
    """Size and growth rate of one kind of data, in GiB."""
    size = f"{item.name} {item.bytes / GIB:.2f} GiB"
    if item.per_day is None:
        return size
    rate = f"{item.per_day / GIB:.2f} a day"
    bound = (
        "" if item.settles_at is None else f", up to {max(item.settles_at, item.bytes) / GIB:.2f}"
    )
    return f"{size} ({rate}{bound})"


def _daemon(settings: Settings) -> Finding:
    """Whether Dagster's daemon sends heartbeats, if a streamer needs it."""
    from kalshi_platform.orchestration.host import daemon  # loads Dagster

    folder = daemon.home(settings.data_dir)
    if folder is None:
        return Finding(Mark.SKIPPED, "Dagster has not run here yet")
    found = daemon.look(folder)
    if not found.silent:
        return Finding(Mark.GOOD, "its schedules, sensors and queue are running")
    beat = found.last_beat
    text = f"its last heartbeat is of {beat:%Y-%m-%d %H:%M:%S} UTC" if beat else "it has not run"
    if not found.streamers:
        return Finding(Mark.SKIPPED, f"{text}; nothing that needs it runs either")
    return Finding(
        Mark.BAD,
        f"{text} ({', '.join(found.silent)}): nothing restarts a streamer that ends, and nothing alerts",
        "start it again (make run, or dagster-daemon run)",
    )


def _alerts(settings: Settings) -> Finding:
    names = [channel.name for channel in channels.configured(settings)]
    if not names:
        return Finding(Mark.SKIPPED, f"no alert is sent anywhere: {_CHANNELS}")
    if troubles := channel_troubles(settings.data_dir):
        return Finding(Mark.ODD, " ".join(troubles), "--test-alert tries them again")
    return Finding(Mark.GOOD, f"sent to {', '.join(names)}; --test-alert tries them")


def _metrics(settings: Settings) -> Finding:
    """Whether the configured metrics endpoint answers and is the platform's."""
    if settings.metrics_port is None:
        return Finding(Mark.SKIPPED, "METRICS_PORT is not set: none are served")
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
    host = everywhere.get(settings.metrics_host, settings.metrics_host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.metrics_port}/metrics"
    try:
        answer = httpx.get(url, timeout=5.0, trust_env=False)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        return Finding(Mark.BAD, f"{url} does not answer ({reason})", "kalshi-platform metrics")
    if "kalshi_disk_free_bytes" not in answer.text:
        return Finding(
            Mark.BAD, f"{url} is another program's", "set METRICS_PORT to a port that is free"
        )
    return Finding(Mark.GOOD, f"{url} answers")


CHECKS: Mapping[str, Check] = {
    "key file": (_key_file, None),
    "clock": (_clock, None),
    "exchange REST": (_rest, None),
    "exchange WebSocket": (_websocket, "exchange REST"),
    "markets": (_markets, "exchange REST"),
    "ClickHouse": (_clickhouse, None),
    "schema": (_schema, "ClickHouse"),
    "data folder": (_data_folder, None),
    "archive": (_archive, None),
    "foreign names": (_foreign, "archive"),
    "market maker's spool": (_spool, None),
    "market maker": (_market_maker, "schema"),
    "growth": (_growth, "data folder"),
    "streamer": (_streamer, None),
    "Dagster daemon": (_daemon, None),
    "alerts": (_alerts, None),
    "metrics": (_metrics, None),
}
"""Each check, and the check without which it cannot succeed."""


def _checks(settings: Settings) -> dict[str, Check]:
    """The checks, with one per shard instead of `streamer` if there are several."""
    shards = monitored_shards.supervised(
        settings.journals_dir, settings.stream_shards, settings.stores
    )
    if len(shards) == 1:
        return dict(CHECKS)
    of_shards: dict[str, Check] = {
        f"shard {shard}": (functools.partial(_streamer, shard=shard), None) for shard in shards
    }
    return {name: check for name, check in CHECKS.items() if name != "streamer"} | of_shards
