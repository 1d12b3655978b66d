"""`qa`: the runbook's inventory sweep, on any ClickHouse; `python -m kalshi_platform.qa.mm_inventory_qa`.

Exit 0: nothing found. 1: ClickHouse cannot be reached, a query failed, or a flag is wrong.
2: anomalies; with --max-age also where data is stale, missing or not judgeable. What is asked is in
inventory/audit.py; here it is called and printed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

import click
import msgspec

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.errors import PlatformError
from kalshi_platform.inventory import audit, breaks, judged
from kalshi_platform.inventory.audit import Outcome, Parameters, Status
from kalshi_platform.inventory.judged import Judged
from kalshi_platform.printable import printable
from kalshi_platform.settings import Settings

FOUND = 2
"""The exit code for anomalies."""

_NATIVE_PORTS = {9000: False, 9440: True}
"""ClickHouse's native ports, which speak no HTTP, and whether they are encrypted."""
_FORMATS = ("table", "json")
_JSON = json.JSONDecoder()


class _WrongFlag(click.UsageError):
    """Exits 1: for the caller 2 means anomalies."""

    exit_code = 1


class _Command(click.Command):
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _WrongFlag(error.format_message(), error.ctx) from None


@click.command("qa", cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", help="ClickHouse host.  [default: CH_HOST, else CLICKHOUSE_URL's]")
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="Its HTTP port.  [default: CH_PORT, else CLICKHOUSE_URL's]",
)
@click.option("--user", help="[default: CH_USER, else CLICKHOUSE_USER]")
@click.option("--password", help="[default: CH_PASSWORD, else CLICKHOUSE_PASSWORD]")
@click.option("--database", help="[default: CH_DATABASE, else CLICKHOUSE_DATABASE]")
@click.option("--secure/--no-secure", default=None, help="HTTPS.  [default: CH_SECURE]")
@click.option(
    "--protocol",
    type=click.Choice(["http", "native"]),
    help="HTTP is spoken whatever is given; native means the HTTP port of the same host.",
)
@click.option("--market-ticker", default="", metavar="TICKER", help="One market only.")
@click.option(
    "--lookback-minutes", default=120, show_default=True, type=click.IntRange(1, 5_256_000)
)
@click.option(
    "--drift-threshold",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Check A: contracts, at least.",
)
@click.option(
    "--open-epsilon",
    default=0.01,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Check B: contracts, more than.",
)
@click.option(
    "--filled-threshold",
    default=0.5,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Check C: contracts, at least.",
)
@click.option(
    "--limit",
    default=200,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most rows to show of each check.",
)
@click.option(
    "--snapshot",
    type=click.Choice(["as-of", "latest"]),
    default="as-of",
    show_default=True,
    help="Check C: against the snapshot at or before each decision, or against the newest.",
)
@click.option(
    "--all", "every", is_flag=True, help="Beside A, B and C the other checks of the UI, too."
)
@click.option(
    "--strict-runbook",
    is_flag=True,
    help="A, B and C by the letter: no fill, settlement or acknowledgement accounts for a difference.",
)
@click.option(
    "--max-age",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Exit 2 also where decisions or snapshots are older than this, missing or not judgeable.",
)
@click.option(
    "--explain", is_flag=True, help="First the breaks behind the rows, each with a reason."
)
@click.option(
    "--verbose", is_flag=True, help="With --explain: also the engine's and exchange's JSON."
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(_FORMATS),
    default="table",
    show_default=True,
)
def command(
    *,
    host: str | None,
    port: int | None,
    user: str | None,
    password: str | None,
    database: str | None,
    secure: bool | None,
    protocol: str | None,
    market_ticker: str,
    lookback_minutes: int,
    drift_threshold: float,
    open_epsilon: float,
    filled_threshold: float,
    limit: int,
    snapshot: str,
    every: bool,
    strict_runbook: bool,
    max_age: float | None,
    explain: bool,
    verbose: bool,
    output_format: str,
) -> None:
    """Does the market maker hold what its rows say that it holds?

    Check A, drift without actions; check B, open exposure without open orders; check C, decisions
    against the exchange's own positions. Exit 0: nothing found, 1: it could not be found out,
    2: anomalies, or with --max-age nothing fresh to judge by.
    """
    if protocol == "native" and port is None:
        port = next(iter(_NATIVE_PORTS))
    target = _target(
        host=host, port=port, user=user, password=password, database=database, secure=secure
    )
    parameters = Parameters(
        lookback_minutes=lookback_minutes,
        market_ticker=market_ticker,
        drift_threshold=drift_threshold,
        open_epsilon=open_epsilon,
        filled_threshold=filled_threshold,
        snapshot=snapshot.replace("-", "_"),
        strict_runbook=strict_runbook,
        limit=limit,
    )
    checks = audit.CHECKS if every else audit.RUNBOOK
    with closing(connect(target, log_comment="qa")) as client:
        start = audit.since(client, parameters)
        looked_at = judged.look(client, parameters, start, max_age_s=max_age)
        outcomes = audit.sweep(client, checks, parameters, start=start)
        explained = (
            breaks.examine(client, checks, parameters, start=start, outcomes=outcomes)
            if explain
            else None
        )
    if output_format == "json":
        click.echo(_json(looked_at, outcomes, explained))
    else:
        _print(looked_at, outcomes, explained, verbose=verbose)
    if any(outcome.status is Status.ANOMALIES for outcome in outcomes):
        sys.exit(FOUND)
    if max_age is not None and looked_at.cautions():
        sys.exit(FOUND)


def _target(
    *,
    host: str | None,
    port: int | None,
    user: str | None,
    password: str | None,
    database: str | None,
    secure: bool | None,
) -> Settings:
    """The settings with the flags, then CH_*, in the place of CLICKHOUSE_*."""
    own = platform_settings.current()
    configured = urlsplit(own.clickhouse_url)
    there = host or own.ch_host or configured.hostname or ""
    same = there == configured.hostname
    wanted_port = port if port is not None else own.ch_port
    tls = secure if secure is not None else own.ch_secure
    if secure is None and not own.ch_secure and same and wanted_port in {None, configured.port}:
        tls = configured.scheme == "https"
    if wanted_port in _NATIVE_PORTS:
        native = wanted_port
        tls = tls or _NATIVE_PORTS[native]
        wanted_port = configured.port if same else None
        wanted_port = wanted_port or (8443 if tls else 8123)
        click.echo(
            f"note: {native} is ClickHouse's native port; using its HTTP port, {wanted_port},"
            f" on {there}. --port names another.",
            err=True,
        )
    if wanted_port is None:
        wanted_port = (configured.port if same else None) or (8443 if tls else 8123)
    bracketed = f"[{there}]" if ":" in there else there
    secret = own.ch_password if own.ch_password is not None else own.clickhouse_password
    return platform_settings.load(
        clickhouse_url=f"{'https' if tls else 'http'}://{bracketed}:{wanted_port}",
        clickhouse_user=user or own.ch_user or own.clickhouse_user,
        clickhouse_password=secret.get_secret_value() if password is None else password,
        clickhouse_database=database or own.ch_database or own.clickhouse_database,
    )


# -- printing ----------------------------------------------------------------------------------


def _print(
    looked_at: Judged,
    outcomes: Sequence[Outcome],
    found: Sequence[breaks.Break] | None,
    *,
    verbose: bool,
) -> None:
    parameters = looked_at.parameters
    of = f" of {printable(parameters.market_ticker)}" if parameters.market_ticker else ""
    click.echo(f"Market-maker inventory{of}, last {parameters.lookback_minutes} minutes")
    click.echo(f"Judged: {looked_at.in_words()}.")
    for caution in looked_at.cautions():
        click.echo(f"warning: {caution.text}")
    for note in looked_at.notes():
        click.echo(f"note: {note}")
    if found is not None:
        _print_breaks(found, verbose=verbose)
    for outcome in outcomes:
        click.echo()
        match outcome.status:
            case Status.SKIPPED:
                click.echo(f"{outcome.check.title}: skipped, {printable(outcome.notice)}")
                continue
            case Status.CLEAR:
                click.echo(f"{outcome.check.title}: nothing found")
            case Status.ANOMALIES:
                shown = len(outcome.rows)
                first = f", the first {shown} shown" if shown < outcome.total else ""
                rows = "row" if outcome.total == 1 else "rows"
                click.echo(f"{outcome.check.title}: {outcome.total} {rows}{first}")
                _print_rows(outcome.columns, outcome.rows)
        if outcome.notice:
            click.echo(f"note: {printable(outcome.notice)}")
    total = sum(outcome.total for outcome in outcomes)
    judging = any(outcome.status is not Status.SKIPPED for outcome in outcomes)
    click.echo()
    if total:
        click.echo(f"Anomalies: {total}")
    else:
        click.echo("No anomalies." if judging else "Nothing was judged.")


def _print_breaks(found: Sequence[breaks.Break], *, verbose: bool) -> None:
    click.echo()
    click.echo(f"Breaks: {len(found) or 'none'}")
    for each in found:
        text = each.explanation if verbose else in_words(each.explanation)
        click.echo(f"{printable(each.headline())}\n    {printable(text)}")


def in_words(explanation: str) -> str:
    """Take the JSON objects out of an explanation, whole ones and those that were cut (…).

    Args:
        explanation: A sentence of a break.

    Returns:
        The sentence without them.
    """
    begin = 0
    while (at := explanation.find(" {", begin)) >= 0:
        try:
            _, end = _JSON.raw_decode(explanation, at + 1)
        except ValueError:
            end = explanation.find("…", at) + 1
        if end:
            explanation = explanation[:at] + explanation[end:]
        else:
            begin = at + 1  # a brace, and no object
    return explanation


def _print_rows(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    lines = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    right = [isinstance(cell, int | float) for cell in rows[0]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, right, strict=True)
        click.echo("  " + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, datetime):
        return audit.moment(cell)
    if isinstance(cell, float):
        return f"{cell:.6f}".rstrip("0").rstrip(".") if math.isfinite(cell) else str(cell)
    return printable(" ".join(str(cell).split()))


def _json(
    looked_at: Judged, outcomes: Sequence[Outcome], found: Sequence[breaks.Break] | None
) -> str:
    answer: dict[str, Any] = {
        "anomalies": sum(outcome.total for outcome in outcomes),
        "judged": {name: _plain(value) for name, value in looked_at.figures().items()},
        "warnings": [
            {"concern": each.concern.value, "text": each.text} for each in looked_at.cautions()
        ],
        "notes": looked_at.notes(),
        "checks": [
            {
                "check": outcome.check.name,
                "title": outcome.check.title,
                "status": outcome.status.value,
                "notice": outcome.notice,
                "total": outcome.total,
                "rows": [
                    dict(zip(outcome.columns, map(_plain, row), strict=True))
                    for row in outcome.rows
                ],
            }
            for outcome in outcomes
        ],
    }
    if found is not None:
        answer["breaks"] = [
            {name: _plain(value) for name, value in each.row().items()} for each in found
        ]
    return msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    return value if isinstance(value, int | float | str | None) else str(value)


def main() -> NoReturn:
    """Run the sweep with the arguments of the command line, as `kalshi-platform qa` does.

    Raises:
        SystemExit: Always. 0: nothing found. 1: ClickHouse cannot be reached, a query failed, or a flag is wrong.
            2: anomalies, or with --max-age stale or missing data.
    """
    try:
        command(prog_name="mm_inventory_qa")
    except PlatformError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
