"""Names in the archive and the hours that they denote.

<root>/<dataset>/date=YYYY-MM-DD/hour=HH/part-<shard>-<first n>-<end n>.parquet
<root>/<dataset>/date=YYYY-MM-DD/hour=HH/part-clickhouse.parquet              rebuilt from there
<root>/<dataset>/date=YYYY-MM-DD/hour=HH/hour-<digest of the file>.parquet    once compacted
<root>/<dataset>/date=YYYY-MM-DD/hour=HH/_manifest.json

<root>/hour_states/YYYY-MM-DDTHH-<shard>.state                                the books before the hour

<root>/<dataset>/date=YYYY-MM-DD/hour=HH/hour.parquet                         of the analytics
<root>/market_catalog/<name>.parquet                                          without hours

An hour is the hour of the receive time in UTC. Every other name is foreign: it is never read, moved or taken
for an hour, and `doctor` lists it. File access belongs in `local` and `object_storage`.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

MANIFEST = "_manifest.json"
PARQUET = ".parquet"
FROM_CLICKHOUSE = "part-clickhouse.parquet"
ASIDE = ".aside"
"""Folder of hours being built, hours just replaced, and locks."""
HOUR_STATES = "hour_states"
"""Folder of the books before each hour's first record, from which an hour is rebuilt of its frames."""
ALLOWED_AT_ROOT = frozenset({ASIDE, "archive.json", "recorders", HOUR_STATES, "lost+found"})
"""Names beside the datasets that are not foreign: the platform's own, and one that file systems create."""
_DAY = re.compile(r"date=([0-9]{4}-[0-9]{2}-[0-9]{2})")
_HOUR = re.compile(r"hour=([01][0-9]|2[0-3])")
_PART = re.compile(r"part-([0-9]+)-([0-9]+)-([0-9]+)\.parquet")
_WHOLE_HOUR = re.compile(r"hour(?:-[0-9a-z]+)?\.parquet")


def hour_path(dataset: str, hour: datetime) -> str:
    """The folder of a dataset's hour, relative to the archive's root."""
    return f"{dataset}/date={hour:%Y-%m-%d}/hour={hour:%H}"


def day_of_name(name: str) -> date | None:
    """The day of a folder name; None for a foreign name."""
    match = _DAY.fullmatch(name)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:  # a date that does not exist, such as the 30th of February
        return None


def hour_of_path(path: str) -> datetime | None:
    """The hour of a folder path; None for a foreign one."""
    above, _, name = path.rpartition("/")
    day, match = day_of_name(above.rpartition("/")[2]), _HOUR.fullmatch(name)
    if day is None or match is None:
        return None
    return datetime(day.year, day.month, day.day, int(match[1]), tzinfo=UTC)


def is_data(name: str) -> bool:
    """Whether a file name in an hour's folder is that of a data file of the platform."""
    ours = _PART.fullmatch(name) or _WHOLE_HOUR.fullmatch(name)
    return ours is not None or name == FROM_CLICKHOUSE


def is_temporary(name: str) -> bool:
    """Whether a name is that of a file being written or set aside by the platform."""
    return name.startswith(".") and name.endswith((".tmp", ".replaced"))


def part_name(shard: int, first_n: int, end_n: int) -> str:
    """The name of the file with the rows of journal records `first_n` to `end_n` - 1."""
    return f"part-{shard}-{first_n:015d}-{end_n:015d}.parquet"


def part_range(name: str) -> tuple[int, int, int] | None:
    """(shard, first_n, end_n) of a part's name; None for another file."""
    match = _PART.fullmatch(name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None
