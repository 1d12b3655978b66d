"""`sql`: run SQL and print a table, or stream any ClickHouse format."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import cast

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from urllib3 import HTTPResponse

from kalshi_platform import settings as platform_settings
from kalshi_platform import typed_json
from kalshi_platform.clickhouse import migrations, queries
from kalshi_platform.clickhouse.client import Client, broken_answer, connect, translated
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.errors import StoreRefused
from kalshi_platform.printable import printable, printable_block

_SOURCE = re.compile(
    r"SOURCE\s+(?P<quote>['\"]?)(?P<path>.+?)(?P=quote)\s*", re.IGNORECASE | re.DOTALL
)
_PLACEHOLDER = re.compile(r"\{\s*(\w+)\s*:")
_NUMBER = re.compile(r"(Nullable\()?(U?Int|Float|Decimal)\d*")

_TABLE_FORMAT = "JSONCompactStringsEachRowWithNamesAndTypes"
"""One line per row, each value as the text that ClickHouse prints, so that decimals stay exact."""

_NULL = "ᴺᵁᴸᴸ"
"""That format's text for NULL."""

_SHOWN_AT_LEAST = {"output_format_decimal_trailing_zeros": 1}
_TAIL_BYTES = 64 * 1024


@click.command()
@click.argument("sql", required=False)
@click.option(
    "--file", "file", metavar="PATH", help="Run the statements of a file, in order; - is stdin."
)
@click.option("--format", "output_format", metavar="FORMAT", help="Any ClickHouse format, raw.")
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of a {NAME:Type} in the SQL.",
)
@click.option(
    "--rows", default=1_000, show_default=True, type=click.IntRange(min=1), help="Longest table."
)
def command(
    sql: str | None, file: str | None, output_format: str | None, params: tuple[str, ...], rows: int
) -> None:
    """Run SQL in the platform's database and print a table.

    SQL may hold several statements; "SOURCE path" runs those of a file. The platform's own files, its
    migrations and queries, are found by name from any folder.

    \b
    kalshi-platform sql "SELECT * FROM top_of_book"
    kalshi-platform sql --file infra/queries/lossless_proof.sql
    kalshi-platform sql "SOURCE 010_inventory_observability.sql"
    kalshi-platform sql --format CSVWithNames "SELECT * FROM latest_levels" > levels.csv
    kalshi-platform sql --param t=TICKER "SELECT count() FROM orderbook_events
        WHERE market_ticker = {t:String}"
    """
    if (sql is None) == (file is None):
        raise click.UsageError("Give either SQL or --file PATH.")
    todo = list(_sourced(sql) if file is None else _sourced(_read(file)))
    values = _values(params, todo)
    with closing(connect(platform_settings.current(), log_comment="sql")) as client:
        for number, statement in enumerate(todo):
            if output_format is not None:
                _pass_through(_run(client, statement, values, output_format))
                continue
            if number:
                click.echo()
            answer = _run(client, statement, values, _TABLE_FORMAT)
            if answer.headers.get("X-ClickHouse-Format") in {_TABLE_FORMAT, None}:
                _print_table(answer, rows)
            else:  # the statement has a FORMAT of its own
                _pass_through(answer)


def _sourced(sql: str | None, within: tuple[Path, ...] = ()) -> Iterator[str]:
    """The statements of `sql`, each SOURCE replaced by those of its file."""
    for statement in statements(sql or ""):
        match = _SOURCE.fullmatch(statement)
        if match is None:
            yield statement
            continue
        path = _found(match["path"]).resolve()
        if path in within:
            raise StoreRefused(f"SQL file {path} sources itself. Remove that SOURCE.")
        yield from _sourced(_read(str(path)), (*within, path))


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else _found(path).read_text("utf-8")
    except UnicodeDecodeError:
        raise StoreRefused(f"SQL file {path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise StoreRefused(
            f"SQL file {path} cannot be read ({error.strerror}). Check the path."
        ) from None


def _found(path: str) -> Path:
    """The file at `path`; if it does not exist, the platform's own file of that name.

    Leading folders are then ignored, since a wheel has no `infra` folder; separators of any system are accepted.
    """
    given = Path(path).expanduser()
    parts = PureWindowsPath(path).parts
    if given.exists() or ".." in parts:
        return given
    for folder in (migrations.folder(), queries.folder()):
        for begin in range(len(parts)):
            own = folder.joinpath(*parts[begin:])
            if own.is_relative_to(folder) and own.is_file():
                click.echo(f"note: {printable(path)} is the platform's own, {own}", err=True)
                return own
    return given


def _values(params: Iterable[str], todo: Iterable[str]) -> Mapping[str, str]:
    """The parameters of --param, each of which must be used by a statement."""
    values = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals:
            raise click.UsageError(f"--param {param!r} is not NAME=VALUE.")
        values[name] = value
    wanted = {name for statement in todo for name in _PLACEHOLDER.findall(statement)}
    if unused := values.keys() - wanted:
        raise click.UsageError(f"No {{{min(unused)}:Type}} in the SQL takes --param {min(unused)}.")
    return values


def _run(
    client: Client, statement: str, values: Mapping[str, str], output_format: str
) -> HTTPResponse:
    """Run a statement with the parameters that it uses."""
    used = set(_PLACEHOLDER.findall(statement))
    with translated():
        answer = client.raw_stream(
            statement,
            parameters={name: value for name, value in values.items() if name in used},
            settings=_SHOWN_AT_LEAST if output_format == _TABLE_FORMAT else None,
            transport_settings={
                "X-ClickHouse-Format": output_format
            },  # a FORMAT in the SQL has precedence
        )
    return cast(HTTPResponse, answer)


def _pieces(answer: HTTPResponse) -> Iterator[bytes]:
    """The body in pieces. Raises the error that ClickHouse appends to an answer that it aborts."""
    tag = answer.headers.get("X-ClickHouse-Exception-Tag")
    tail = b""
    try:
        with translated():
            for piece in answer.stream(65_536):
                tail = (tail + piece)[-_TAIL_BYTES:] if tag else b""
                yield piece
    finally:
        answer.close()
        if tag and (failed := broken_answer(tail, tag)):
            raise failed


def _pass_through(answer: HTTPResponse) -> None:
    """Write the answer unchanged; on a terminal with control characters escaped."""
    sys.stdout.flush()
    out, on_terminal = sys.stdout.buffer, sys.stdout.isatty()
    decode = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace").decode
    for piece in _pieces(answer):
        out.write(printable_block(decode(piece)).encode() if on_terminal else piece)
    out.flush()


def _rows(answer: HTTPResponse) -> Generator[list[str]]:
    rest = b""
    for piece in _pieces(answer):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"["):
                yield typed_json.decode(line, list[str])


def _print_table(answer: HTTPResponse, limit: int) -> None:
    """Print an answer as a table of at most `limit` rows."""
    lines = _rows(answer)
    with closing(lines):
        names = next(lines, [])
        types = next(lines, [])
        rows = list(islice(lines, limit))
        more = next(lines, None) is not None
    if not names:
        return  # a statement without an answer
    right = [_NUMBER.match(kind) is not None for kind in types]
    console = Console()
    if console.is_terminal:
        _print_rich(console, names, right, rows)
    else:
        _print_plain(names, right, rows)
    if more:
        click.echo(f"first {limit} rows; --rows N shows more, --format streams them all", err=True)


def _print_rich(
    console: Console, names: list[str], right: list[bool], rows: list[list[str]]
) -> None:
    table = Table()
    for name, is_number in zip(names, right, strict=True):
        table.add_column(
            Text(_shown(name)), justify="right" if is_number else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(_shown(cell), style="dim" if cell == _NULL else "") for cell in row))
    console.print(table)
    console.print(Text(f"{len(rows)} row{'' if len(rows) == 1 else 's'}", style="dim"))


def _print_plain(names: list[str], right: list[bool], rows: list[list[str]]) -> None:
    lines: list[list[str]] = [[_shown(cell) for cell in row] for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, right, strict=True)
        click.echo("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())


def _shown(cell: str) -> str:
    """A cell on one line."""
    if cell == _NULL:
        return "NULL"
    return printable(cell)
