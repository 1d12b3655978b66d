"""Compare the rows of the archive and ClickHouse, hour by hour, by count and by content.

For a sealed hour, the manifest, the Parquet files and ClickHouse must agree on the rows of every
recorded dataset: same number, same checksum (`archive.checksum`, which is independent of order and encoding).
There is no tolerance. Results are kept in `$KALSHI_DATA_DIR/checks/hot_cold_parity.json`: a run
compares the newest hours that are new or whose files have changed, then those that differed, then
those last compared a week ago. Nothing is repaired here: `restore` does that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pyarrow as pa

from kalshi_platform import durable, typed_json
from kalshi_platform.archive import Archive, Manifest, batches, checksum, hours, open_archive
from kalshi_platform.archive.checksum import Content
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import hot_retention
from kalshi_platform.errors import StoreRefused
from kalshi_platform.loading import hot_hour
from kalshi_platform.quality.continuity import Extent
from kalshi_platform.schema import DATASETS, Dataset
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR

log = logging.getLogger(__name__)

HOURS_AT_A_TIME = 3
AGAIN_AFTER = timedelta(days=7)
_EXPIRES_SOON = timedelta(hours=2)
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


class Difference(msgspec.Struct, frozen=True):
    """One dataset's hour that differs between manifest, archive and ClickHouse. A missing checksum is empty."""

    hour: str
    dataset: str
    what: str
    """The difference, as a sentence."""
    rows_manifest: int
    rows_parquet: int
    rows_clickhouse: int
    checksum_manifest: str
    checksum_parquet: str
    checksum_clickhouse: str
    remedy: str = ""
    """The remedy, as a sentence."""


class _Verdict(msgspec.Struct, frozen=True):
    files: str
    """Fingerprint of the hour's files: names, sizes, times."""
    at: float
    rows: int
    differences: list[Difference]


class _Memory(msgspec.Struct, frozen=True):
    clickhouse: str
    """The server and database that were compared."""
    hours: dict[str, _Verdict]


@dataclass(frozen=True)
class Parity:
    """What one run compared, and the results of all hours in both stores."""

    compared: tuple[datetime, ...]
    rows: int
    """Rows of those hours, in each store."""
    equal: int
    """Hours whose last comparison found no difference."""
    waiting: int
    """Sealed hours still to be compared."""
    behind: tuple[datetime, ...]
    """Sealed hours that ClickHouse does not have completely yet."""
    cold_only: int
    """Sealed hours from before ClickHouse's first row."""
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class _Side:
    content: Content
    fault: str = ""

    @property
    def rows(self) -> int:
        return self.content.rows

    @property
    def checksum(self) -> str:
        return checksum.text(self.content.total) if self.rows else ""


def compare_hours(
    settings: Settings,
    client: clickhouse.Client,
    hot: Extent,
    now: datetime,
    *,
    behind: bool = False,
    limit: int = HOURS_AT_A_TIME,
) -> Parity:
    """Compare up to `limit` hours; return their results and those of all other hours in both stores.

    `behind`: ClickHouse's loader reports that it lags, so a difference proves nothing yet. Raises `StoreError`
    as ClickHouse does; a file that cannot be read is a difference.
    """
    archive = open_archive(settings)
    path = settings.data_dir / "checks" / "hot_cold_parity.json"
    where = f"{settings.clickhouse_url} {settings.clickhouse_database}"
    known = _known_verdicts(path, where)
    days = [d for d in hot_retention.kept(client).values() if d is not None]
    kept_from = now - timedelta(days=min(days)) + _EXPIRES_SOON if days else _BEGINNING
    fingerprints = _sealed(archive, kept_from)
    sealed = sorted(fingerprints)
    loaded = [h for h in sealed if h + HOUR <= hot.newest]
    shared = [h for h in loaded if h + HOUR > hot.first]
    verdicts = {
        hour: verdict
        for hour in shared
        if (verdict := known.get(_key(hour))) is not None and verdict.files == fingerprints[hour]
    }
    late = [hour for hour in sealed if hour not in loaded]
    compared = []
    rows = 0
    for hour in _due(shared, verdicts, now)[:limit]:
        verdict = _compare(client, archive, hour, fingerprints[hour], now)
        if _sealed(archive, hour, hour).get(hour) != fingerprints[hour]:
            continue  # rewritten meanwhile: the next run compares it
        if verdict.differences and behind:
            late.append(hour)
            continue
        verdicts[hour] = verdict
        compared.append(hour)
        rows += verdict.rows
    _keep(path, _Memory(where, {_key(hour): v for hour, v in sorted(verdicts.items())}))
    return Parity(
        compared=tuple(compared),
        rows=rows,
        equal=sum(not v.differences for v in verdicts.values()),
        waiting=len([h for h in shared if h not in verdicts and h not in late]),
        behind=tuple(sorted(late)),
        cold_only=len(loaded) - len(shared),
        differences=tuple(d for hour in sorted(verdicts) for d in verdicts[hour].differences),
    )


def _sealed(archive: Archive, first: datetime, last: datetime | None = None) -> dict[datetime, str]:
    """Return the sealed hours after `first` with a fingerprint of their files.

    The fingerprint changes when files are rewritten.
    """
    found: dict[datetime, list[str]] = {}
    sealed = set()
    for name in hours.RECORDED:
        for hour, listed in archive.listing(name, first, last).items():
            if listed.manifest is not None:
                sealed.add(hour)
            for file in (*listed.files, *listed.foreign, listed.manifest):
                if file is not None:
                    text = f"{name}/{file.name}:{file.bytes}:{file.version}"
                    found.setdefault(hour, []).append(text)
    return {
        hour: checksum.text(
            checksum.rows_checksum(pa.table({"file": pa.array(found[hour], pa.string())}))
        )
        for hour in sorted(sealed)
    }


def _due(
    shared: Sequence[datetime], verdicts: Mapping[datetime, _Verdict], now: datetime
) -> list[datetime]:
    """Return the hours to compare, in order: new ones, those that differed, those compared a week ago."""
    new = [hour for hour in reversed(shared) if hour not in verdicts]
    seen = sorted(verdicts, key=lambda hour: verdicts[hour].at)
    differed = [hour for hour in seen if verdicts[hour].differences]
    old = now.timestamp() - AGAIN_AFTER.total_seconds()
    again = [h for h in seen if not verdicts[h].differences and verdicts[h].at < old]
    return [*new, *differed, *again[:1]]


# -- one hour ----------------------------------------------------------------------------------


def _compare(
    client: clickhouse.Client, archive: Archive, hour: datetime, files: str, now: datetime
) -> _Verdict:
    differences = []
    rows = 0
    for name in hours.RECORDED:
        cold = _cold(archive, DATASETS[name], hour)
        hot = _hot(client, DATASETS[name], hour) if DATASETS[name].hot else cold
        rows += cold.rows
        found = _difference(_manifest(archive, name, hour), cold, hot, hour, name)
        if found is not None:
            differences.append(found)
    return _Verdict(files, now.timestamp(), rows, differences)


def _manifest(archive: Archive, dataset: str, hour: datetime) -> _Side:
    try:
        manifest: Manifest | None = archive.read_manifest(dataset, hour)
    except StoreRefused as error:
        return _Side(Content(), str(error))
    return _Side(Content(manifest.rows, int(manifest.checksum, 16)) if manifest else Content())


def _cold(archive: Archive, dataset: Dataset, hour: datetime) -> _Side:
    content = Content()
    try:
        listed = archive.listed(dataset.name, hour)
        listed.refuse_foreign(archive.where(dataset.name, hour))
        for file in listed.files:
            for table in batches(file, dataset.arrow):
                content += checksum.content(table)
    except StoreRefused as error:
        return _Side(content, str(error))
    return _Side(content)


def _hot(client: clickhouse.Client, dataset: Dataset, hour: datetime) -> _Side:
    content = Content()
    for table in hot_hour.tables(client, dataset, hour):
        content += checksum.content(table)
    return _Side(content)


def _difference(
    manifest: _Side, cold: _Side, hot: _Side, hour: datetime, dataset: str
) -> Difference | None:
    sentences = []
    remedy = ""
    if not cold.fault and not cold.content.agrees_with(hot.content):
        sentences.append(_comparison("ClickHouse", hot, "the archive", cold))
        remedy = f"Run kalshi-platform restore --hours {hour:%Y-%m-%d-%H}"
        remedy += "." if hot.rows < cold.rows else " --replace."
    fault = manifest.fault or cold.fault
    if not fault and (manifest.rows, manifest.checksum) != (cold.rows, cold.checksum):
        fault = _comparison("The files", cold, "the manifest", manifest)
    if fault:
        sentences.insert(0, fault)
        remedy = "Materialise the hour again."
    if not sentences:
        return None
    return Difference(
        hour=f"{hour:%Y-%m-%d %H:00}",
        dataset=dataset,
        what=" ".join(sentences),
        rows_manifest=manifest.rows,
        rows_parquet=cold.rows,
        rows_clickhouse=hot.rows,
        checksum_manifest=manifest.checksum,
        checksum_parquet=cold.checksum,
        checksum_clickhouse=hot.checksum,
        remedy=remedy,
    )


def _comparison(one: str, has: _Side, other: str, wanted: _Side) -> str:
    if has.rows < wanted.rows:
        return f"{one} lacks {wanted.rows - has.rows:,} of {other}'s {wanted.rows:,} rows."
    if has.rows > wanted.rows:
        return f"{one} has {has.rows - wanted.rows:,} rows more than {other}, of {has.rows:,}."
    return f"{one} and {other} have {has.rows:,} rows each, with different values."


# -- results of earlier runs -------------------------------------------------------------------


def _key(hour: datetime) -> str:
    return f"{hour:%Y-%m-%dT%H}"


def _known_verdicts(path: Path, where: str) -> dict[str, _Verdict]:
    try:
        memory = typed_json.decode(path.read_bytes(), _Memory)
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, OSError) as error:
        log.warning("%s cannot be read (%s): every hour is compared again.", path, error)
        return {}
    return memory.hours if memory.clickhouse == where else {}


def _keep(path: Path, memory: _Memory) -> None:
    try:
        durable.replace_unsynced(path, msgspec.json.encode(memory))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): the next run compares these hours again. Make it writable.",
            path,
            error.strerror,
        )
