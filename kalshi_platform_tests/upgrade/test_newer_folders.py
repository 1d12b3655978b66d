"""A data folder that a later version wrote is refused in a sentence, and left as it is.

Files that say which version wrote them are in `VERSIONED`, with what refuses them; those that carry none are
in `UNVERSIONED`: they are read by their members, and belong to a journal and an archive that say it.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kalshi_platform import checked_json
from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import LocalArchive, archive_identity, archive_ledger, compaction
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands.main import main
from kalshi_platform.errors import StoreRefused
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading import cursor, loader, state_files
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.shared_rows import SharedRows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.settings import Settings
from kalshi_platform_tests.archived import paths as parts
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.loading.test_loader import archived
from kalshi_platform_tests.upgrade.test_older_folders import unpacked

PATIENCE_S = 60.0
RECENT = "b5ce1cc"
JOURNAL = "journal/shard-0/journal.json"
CURSOR = "journal/shard-0/load/parquet.json"
ARCHIVE = "parquet/archive.json"
RECORDERS = "parquet/recorders/*.json"
VERSIONED = {
    JOURNAL: journal_identity.FORMAT,
    CURSOR: cursor.FORMAT,
    ARCHIVE: archive_identity.FORMAT,
    RECORDERS: archive_ledger.FORMAT,
}
"""Those in JSON, and the format that this version knows."""
STATES = ("journal/shard-0/load/*.state", "journal/shard-0/load/hours/*.state")
UNVERSIONED = (
    "journal/shard-0/*.arrows",  # Arrow's own format, with our columns
    "journal/shard-0/passed.json",
    "journal/shard-0/health.json",
    "journal/shard-0/.health.json.twin",
    "journal/shard-0/lock",
    "parquet/*/date=*/hour=*/*.parquet",  # Parquet's own
    "parquet/*/date=*/hour=*/_manifest.json",
    "parquet/.aside/*.lock",
)
REFUSALS = {
    JOURNAL: ("adopt", "proof", "doctor"),
    CURSOR: ("adopt", "proof"),
    ARCHIVE: ("adopt", "proof", "restore"),
    RECORDERS: ("adopt",),
}
"""Which commands read the file; so does a recorder, at its start the first and in its loads the others."""


class _Later(msgspec.Struct):
    """A file of a later version: of its members, this one knows the format alone."""

    format: int
    entirely: str = "otherwise"


def made_later(data: Path, name: str) -> tuple[Path, bytes]:
    """The file, and what a later version has put there."""
    (path,) = data.glob(name)
    content = checked_json.encode(_Later(VERSIONED[name] + 1))
    path.write_bytes(content)
    return path, content


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """Commands read the settings of the test's environment."""
    platform_settings.current.cache_clear()
    yield
    platform_settings.current.cache_clear()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder, which nothing changes."""
    return unpacked(RECENT, tmp_path_factory.mktemp("recorded") / "data")


@pytest.fixture
def settings(tmp_path: Path, recorded: Path) -> Settings:
    """A recorded folder, without ClickHouse."""
    data = tmp_path / "data"
    shutil.copytree(recorded, data, ignore=shutil.ignore_patterns("clickhouse"))
    return settings_for("http://127.0.0.1:1", "kalshi", kalshi_data_dir=data, use_clickhouse=False)


@contextmanager
def loading(settings: Settings) -> Iterator[Loader]:
    """A recorder's load into ClickHouse, where the settings use it, else the archive; begun on this folder."""
    folder = settings.journal_dir()
    claims = cursor.claims(folder)
    reached = cursor.reached(folder, known.id) if (known := journal_identity.read(folder)) else 0
    writer = Writer(folder, reached=reached, claims=claims)
    store = (
        ClickHouseSink(settings, str(writer.id))
        if settings.use_clickhouse
        else ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None)
    )
    begun = Loader(
        folder,
        writer,
        store,
        Pace(rows=10_000, seconds=0.0, first_s=0.0),
        shared_rows=SharedRows(folder, 0),
    )
    begun.start()
    try:
        yield begun
    finally:
        begun.drain()
        begun.join(PATIENCE_S)
        writer.close()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "command"), [(name, each) for name, all_of in REFUSALS.items() for each in all_of]
)
def test_a_command_refuses_a_later_format_and_leaves_the_file(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.chdir(settings.data_dir.parent)
    monkeypatch.setenv("KALSHI_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("USE_CLICKHOUSE", "1" if command == "restore" else "0")
    monkeypatch.setenv("CLICKHOUSE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("KALSHI_REST_URL", "http://127.0.0.1:1/trade-api/v2")
    monkeypatch.setenv("KALSHI_WS_URL", "ws://127.0.0.1:1/trade-api/ws/v2")
    path, content = made_later(settings.data_dir, name)
    done = CliRunner().invoke(main, [command])
    said = f"{done.output} {done.exception}".replace("\n", " ")
    assert done.exit_code == 1
    assert f"has format {VERSIONED[name] + 1}: a later version wrote it" in " ".join(said.split())
    assert path.name in said
    assert path.read_bytes() == content


def test_no_recorder_starts_on_a_later_journal(settings: Settings) -> None:
    made_later(settings.data_dir, JOURNAL)
    with pytest.raises(
        JournalError, match=r"journal\.json has format 3: .* Install that version\.$"
    ):
        Writer(settings.journal_dir())


@pytest.mark.parametrize("name", [CURSOR, ARCHIVE, RECORDERS])
def test_a_load_that_meets_a_later_format_waits_and_the_journal_goes_on(
    settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "RESTART_S", 0.2)
    monkeypatch.setattr(loader, "DRAIN_GIVE_UP_S", 0.2)
    (path,) = settings.data_dir.glob(name)
    before = path.read_bytes()
    _, content = made_later(settings.data_dir, name)
    rows = archived(settings.archive_dir, "orderbook_events")
    with loading(settings) as begun:
        wait_for(lambda: begun.trouble, "the refusal")
        assert f"{path.name}" in str(begun.trouble)
        assert "a later version wrote it. Install that version." in str(begun.trouble)
        assert begun.refused
        assert path.read_bytes() == content
        # the remedy: of the cursor, also to remove it; of any, the version that knows the file
        path.unlink() if name == CURSOR else path.write_bytes(before)
        wait_for(lambda: begun.committed and begun.trouble is None, "the load")
    assert begun.lag == 0
    assert archived(settings.archive_dir, "orderbook_events").equals(rows)
    assert isinstance(
        cursor.read(settings.journal_dir(), "parquet", _journal(settings)), cursor.Cursor
    )


def _journal(settings: Settings) -> uuid.UUID:
    known = journal_identity.read(settings.journal_dir())
    assert known is not None
    return known.id


def test_books_that_a_later_version_kept_are_derived_again(settings: Settings) -> None:
    """They are no more than what the journal gives: nothing is refused for them."""
    for pattern in STATES:
        for path in settings.data_dir.glob(pattern):
            path.write_bytes(path.read_bytes().replace(state_files.MAGIC, b"KSTATE99", 1))
            with pytest.raises(state_files.UnreadableState, match="another version wrote it"):
                state_files.load(path)
    rows = archived(settings.archive_dir, "orderbook_events")
    with loading(settings) as begun:
        wait_for(lambda: begun.committed, "the load")
    assert (begun.failure, begun.lag) == (None, 0)
    assert archived(settings.archive_dir, "orderbook_events").equals(rows)


def test_an_hour_with_columns_of_later_is_not_written_again(settings: Settings) -> None:
    """It has no number: its columns say it."""
    (hour,) = compaction.pending(archive := LocalArchive(settings.archive_dir))
    paths = {path: path.read_bytes() for path in parts(settings.archive_dir, "trades", hour)}
    for path in paths:
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.append_column("of_later", pa.nulls(table.num_rows, pa.int8())), path)
        paths[path] = path.read_bytes()
    refused: list[str] = []
    compaction.compact(archive, [hour], lambda _: None, lambda _, error: refused.append(str(error)))
    assert all(path.read_bytes() == content for path, content in paths.items())
    assert len(refused) == 1
    assert (
        "columns of_later, which this version does not know: a later version wrote it."
        in refused[0]
    )


def test_every_file_of_a_data_folder_is_listed_here(settings: Settings) -> None:
    """A new kind of file gets a format and a refusal, or is put among those that need none."""
    files = [path for path in settings.data_dir.rglob("*") if path.is_file()]
    names = [str(path.relative_to(settings.data_dir)) for path in files]
    listed = (*VERSIONED, *STATES, *UNVERSIONED, "journal/shard-0/load/clickhouse.json")
    of_ours = [name for name in names if not name.startswith("clickhouse/")]  # the engine's own
    assert [name for name in of_ours if not any(fnmatch(name, each) for each in listed)] == []
    for pattern in (*VERSIONED, *STATES):
        for path in settings.data_dir.glob(pattern):
            content = path.read_bytes()
            assert content.startswith(state_files.MAGIC) or b'"format":' in content


# -- the database ------------------------------------------------------------------------------


def test_a_later_schema_is_used_where_the_tables_are_as_expected_and_else_refused(
    settings: Settings, clickhouse_url: str, clickhouse_database: str
) -> None:
    hot = settings_for(
        clickhouse_url,
        clickhouse_database,
        kalshi_data_dir=settings.data_dir,
        hot_retention_days=36_500,
    )
    migrations.migrate(hot)
    with closing(connect(hot)) as client:
        client.command("INSERT INTO schema_migrations VALUES (999, 'of_later', 'sum', now64(3))")
        client.command("ALTER TABLE trades ADD COLUMN of_later Nullable(UInt8)")
        assert migrations.migrate(hot) == []
        client.command("ALTER TABLE trades DROP COLUMN taker_book_side")
        with pytest.raises(
            StoreRefused,
            match=r"^999_of_later of database \w+ is a later version's, .*trades\.taker_book_side is missing.*"
            r" Install that version\. To stay with this one, set CLICKHOUSE_DATABASE .*kalshi-platform restore\.$",
        ):
            migrations.migrate(hot)


def test_the_remedy_of_a_later_schema_is_another_database_that_is_filled(
    settings: Settings,
    clickhouse_url: str,
    clickhouse_database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(settings.data_dir.parent)
    monkeypatch.setenv("KALSHI_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", clickhouse_database)
    monkeypatch.setenv("HOT_RETENTION_DAYS", "36500")
    for command in ("migrate", "restore"):
        done = CliRunner().invoke(main, [command], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    hot = platform_settings.load()
    with loading(hot) as begun:  # what the journal has is left to it
        wait_for(lambda: begun.committed and not begun.lag, "the load")
    with closing(connect(hot)) as client:
        rows = client.query("SELECT count() FROM orderbook_events").first_row
    assert rows == (archived(settings.archive_dir, "orderbook_events").height,)
