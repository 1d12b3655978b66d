"""Public copies of the archive's hours: an allow-list removes the recorder's private data.

Private in a recording are: `client_order_id` of own orders; frames of private channels (fills, own orders,
positions, quotes), of which even the time is secret; the raw bytes of unreadable frames and of frames of
unknown types, which may be any of these; and free text. Therefore datasets, event kinds and the fields of
their `detail` are published only where they are listed here.

Withheld rows that have a sequence number keep it, as kind `withheld`, so that the published hours can still
be proved complete. Withheld rows without one are left out.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform import __version__
from kalshi_platform.archive import (
    Archive,
    File,
    LocalArchive,
    Manifest,
    Part,
    batches,
    hours,
    local_file,
    stage_manifest,
    write_durably,
)
from kalshi_platform.archive.compaction import SORTED_BY, own_dictionaries
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.errors import StoreRefused
from kalshi_platform.exchange.frames import DecodeError
from kalshi_platform.schema import (
    DATASETS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    Dataset,
)
from kalshi_platform.schema import FRAMES as FRAMES_DATASET

PUBLIC = tuple(name for name, dataset in DATASETS.items() if dataset.public)
"""The datasets that contain nothing private once scrubbed."""

MARK = "_public.json"
"""Marks the root of a folder that contains nothing but published hours."""
WITHHELD = "withheld"
ZSTD_LEVEL = 9
MIN_SEARCHED_LENGTH = 8
"""Own ids of at least this many characters are searched for in the written files; a shorter one, such as
`1`, would match everywhere. Ids of any length are cleared."""

NOTES: Mapping[str, frozenset[str]] = {
    kind: frozenset(fields.split())
    for kind, fields in {
        "started": "version shard",
        "connected": "use_yes_price asked_yes_price markets attempt assumed",
        "disconnected": "cause frames seconds span_s last_frame",
        "unheard": "cause until",
        "heartbeat": "state frames markets synced last_heard_ns backlog_bytes",
        "refused": "channel action code",
        "recovered": "channel cause since until missing trades",
        "gap": "cause expected got missing channel seq side price size span_s record until_record"
        " use_yes_price asked of clock after",
        "malformed_field": "field seq",
        "resynced": "cause expected got markets seconds unchanged changed clock after until",
        "clock_fell": "of seq clock after",
        "schedule": "weekly windows",
        "unknown_field": "what type path found",
        "left": "",
        "unknown_market": "",
        "audit": "markets levels mismatches",
        "mismatch": "side price ours theirs",
        "snapshot": "levels clock unchanged",
    }.items()
}
"""Events written by the recorder itself: the fields of `detail` that may be published."""

_LIFECYCLE = (
    "market_ticker event_type open_ts close_ts determination_ts settled_ts is_deactivated result"
    " settlement_value price_level_structure price_ranges exchange_index additional_metadata strike_type"
    " floor_strike cap_strike name title yes_sub_title no_sub_title rules_primary rules_secondary"
)
ENVELOPE = frozenset({"type", "id", "sid", "seq", "sending_ts_ms"})
FRAMES: Mapping[str, frozenset[str]] = {
    kind: frozenset(fields.split())
    for kind, fields in {
        "subscribed": "channel sid",
        "ok": "",
        "unsubscribed": "",
        "error": "code",
        "ticker": (
            "market_ticker market_id price_dollars yes_bid_dollars yes_ask_dollars yes_bid_size_fp"
            " yes_ask_size_fp last_trade_size_fp volume_fp open_interest_fp dollar_volume"
            " dollar_open_interest ts ts_ms time price yes_bid yes_ask volume open_interest"
        ),
        "trade": (
            "trade_id market_ticker yes_price_dollars no_price_dollars count_fp taker_side"
            " taker_outcome_side taker_book_side is_block_trade ts ts_ms yes_price no_price count"
        ),
        "market_lifecycle_v2": _LIFECYCLE,
        "multivariate_market_lifecycle": _LIFECYCLE,
        "event_lifecycle": (
            "event_ticker exchange_index title subtitle sub_title collateral_return_type series_ticker"
        ),
        "event_fee_update": (
            "event_ticker series_ticker fee_type fee_multiplier fee_type_override"
            " fee_multiplier_override"
        ),
    }.items()
}
"""Frames of public channels: the fields of `msg` that may be published, besides type, id, sid and seq."""

_DELTA = "market_ticker market_id clock price_dollars delta_fp price delta side ts ts_ms"
_SNAPSHOT = (
    "market_ticker market_id clock yes_dollars_fp no_dollars_fp yes_dollars no_dollars yes no"
)
_METADATA = (
    "name title yes_sub_title no_sub_title rules_primary rules_secondary can_close_early event_ticker"
    " expected_expiration_ts strike_type floor_strike cap_strike custom_strike"
)
_HEAD = "type id sid seq sending_ts_ms msg"
PUBLIC_KEYS: Mapping[str, frozenset[str]] = {
    kind: frozenset(f"{_HEAD} {fields}".split())
    for kind, fields in {
        "delta": _DELTA,
        "snapshot": _SNAPSHOT,
        "trade": " ".join(FRAMES["trade"]),
        "control": f"channel {' '.join(FRAMES['ticker'])} {_LIFECYCLE} {_METADATA} "
        + " ".join(FRAMES["event_lifecycle"] | FRAMES["event_fee_update"]),
    }.items()
}
"""Keys that a published frame of each `type` may have: those of public channels. A control frame of a private
channel has others."""

_PUBLIC_TYPE = (
    r'^\{\s*"type"\s*:\s*"(?:orderbook_delta|orderbook_snapshot|'
    f'{"|".join(sorted(FRAMES.keys() - {"error"}))})"'
)

_OWN = frozenset({"client_order_id", "order_id", "user_id", "order_group_id", "fill_id"})
"""Fields whose values identify the recorder's own orders or account, at any depth."""


@dataclass
class Published:
    """The result for one dataset's hour, after it was written and read back."""

    dataset: str
    hour: datetime
    rows: int = 0
    bytes: int = 0
    cleared: int = 0
    """Rows whose `client_order_id` was cleared."""
    withheld: int = 0
    """Rows of which only the sequence number was kept."""
    removed: Counter[str] = field(default_factory=Counter)
    """Rows left out, by kind."""
    own_ids: int = 0
    """Own ids that were searched for in the written hour and not found."""


def publish(
    archive: Archive,
    to: Path,
    *,
    span: tuple[datetime, datetime] | None,
    wanted: Collection[str],
    done: Callable[[Published], None],
    left: Callable[[str], None],
) -> None:
    """Copy the sealed hours of `span` (None: all) of the `wanted` datasets from `archive` to `to`.

    `done` receives each published hour, `left` a sentence for each hour that is not published. Hours that
    `to` already has are replaced, each in one step.

    Raises: `StoreRefused` where `to` is in the archive or contains it, where it holds anything but published
    hours, where an hour differs from its manifest, or where private data is found in a written file (which
    is not put in place then).
    """
    _verify_separate(archive, to)
    _mark_folder(to)
    public = LocalArchive(to)
    available = {name: set(archive.hours(name)) for name in sorted(wanted)}
    with public.compacting():
        for hour in sorted(set().union(*available.values())):
            if span is not None and not span[0] <= hour <= span[1]:
                continue
            own = own_ids(archive, hour)
            for name in (name for name, with_data in available.items() if hour in with_data):
                manifest = archive.read_manifest(name, hour)
                if manifest is None or not manifest.complete:
                    left(f"{name} of {hour:%Y-%m-%d %H:00} UTC is not sealed: left out.")
                    continue
                staged = public.staging(name, hour)
                try:
                    done(
                        _publish_hour(
                            archive, public, DATASETS[name], manifest, staged=staged, own=own
                        )
                    )
                except BaseException:
                    shutil.rmtree(staged, ignore_errors=True)  # it may contain private data
                    raise
        with public.changing():
            public.sweep()


def _verify_separate(archive: Archive, to: Path) -> None:
    if not isinstance(archive, LocalArchive):
        return
    ours, theirs = archive.root.resolve(), to.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise StoreRefused(
            f"--to {to} is in the archive, {archive}, or contains it. Give a folder apart from it."
        )


def _mark_folder(to: Path) -> None:
    """Create and mark the folder, or verify the mark: a plain copy of the archive must not be published."""
    mark = to / MARK
    try:
        if to.is_dir() and any(to.iterdir()) and not mark.is_file():
            raise StoreRefused(
                f"--to {to} is not empty and was not made by `export --public` (it has no {MARK}): its"
                " content may be private. Give a new folder."
            )
        to.mkdir(parents=True, exist_ok=True)
        mark.write_text(f'{{"scrubbed_by": "kalshi-platform {__version__}"}}\n')
    except OSError as error:
        raise StoreRefused(
            f"--to {to} cannot be written ({error.strerror}). Give another folder."
        ) from None


# -- one hour ----------------------------------------------------------------------------------


def _publish_hour(
    archive: Archive,
    to: LocalArchive,
    dataset: Dataset,
    manifest: Manifest,
    *,
    staged: Path,
    own: Collection[str],
) -> Published:
    hour = datetime.fromisoformat(manifest.hour)
    published = Published(dataset.name, hour)
    sources = archive.files(dataset.name, hour)
    source, written = RowStatistics(dataset), RowStatistics(dataset)
    sorted_by = (
        SORTED_BY.get(dataset.name, ()) if hours.is_compacted([p.name for p in sources]) else ()
    )
    parts = []
    for file in sources:
        before = written.rows
        path = staged / file.name
        tables = _scrubbed(file, dataset, source, written, published)
        size = write_durably(path, tables, dataset.arrow, level=ZSTD_LEVEL, sorted_by=sorted_by)
        if written.rows == before:
            path.unlink()  # a file without rows is not needed
        else:
            name = _name_by_content(path)
            parts.append(Part(name, written.rows - before, size))
    if (source.rows, source.checksum) != (manifest.rows, manifest.checksum):
        raise StoreRefused(
            f"{dataset.name} of {manifest.hour}: its files hold {source.rows:,} rows of checksum"
            f" {source.checksum}, its manifest says {manifest.rows:,} of {manifest.checksum}. It was not"
            " published. Materialise that hour again."
        )
    _read_back([staged / part.file for part in parts], dataset, written, own)
    published.rows, published.bytes, published.own_ids = (
        written.rows,
        sum(part.bytes for part in parts),
        len(own),
    )
    after = msgspec.structs.replace(
        manifest,
        rows=written.rows,
        bytes=published.bytes,
        markets=written.markets,
        first=written.first.isoformat() if written.first else None,
        last=written.last.isoformat() if written.last else None,
        checksum=written.checksum,
        parts=parts,
        compacted=hours.is_compacted([part.file for part in parts]),
        merged=[],
    )
    stage_manifest(staged, after)
    with to.changing():
        to.replace_hour(dataset.name, hour, staged)
    return published


def _scrubbed(
    file: File,
    dataset: Dataset,
    source: RowStatistics,
    written: RowStatistics,
    published: Published,
) -> Iterator[pa.Table]:
    for table in batches(file, dataset.arrow):
        source.add(table)
        if dataset is ORDERBOOK_EVENTS:
            table = _without_own_orders(table, published)  # noqa: PLW2901 - the same rows, scrubbed
        elif dataset is STREAM_EVENTS:
            table = _public_events(table, published)  # noqa: PLW2901 - the rows that may stay
        elif dataset is FRAMES_DATASET:
            table = _public_frames(table, published)  # noqa: PLW2901 - the rows that may stay
        table = own_dictionaries(table)  # noqa: PLW2901 - the old dictionary may contain removed values
        written.add(table)
        yield table


def _name_by_content(path: Path) -> str:
    """Name a compacted hour's file by its bytes, which scrubbing has changed; return its name."""
    if not path.name.startswith(hours.COMPACTED):
        return path.name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return path.rename(path.with_name(f"{hours.COMPACTED}{digest}.parquet")).name


# -- scrubbing ---------------------------------------------------------------------------------


def _without_own_orders(table: pa.Table, published: Published) -> pa.Table:
    at = table.column_names.index("client_order_id")
    own = table[at].cast(pa.string())
    published.cleared += pc.sum(pc.not_equal(own, "")).as_py() or 0
    empty = pa.repeat(pa.scalar("", pa.string()), table.num_rows).dictionary_encode()
    return table.set_column(at, table.schema.field(at), empty.cast(table.schema.field(at).type))


def _public_events(table: pa.Table, published: Published) -> pa.Table:
    events = pl.DataFrame(pl.from_arrow(table)).with_columns(
        pl.col("kind", "market_ticker").cast(pl.String)
    )
    public = pl.col("kind").is_in([*NOTES, *FRAMES])
    out = events.filter(~public & (pl.col("seq") == 0))
    published.removed.update(dict(out.group_by("kind").len().iter_rows()))
    published.withheld += events.filter(~public & (pl.col("seq") > 0)).height
    kept = events.filter(public | (pl.col("seq") > 0)).with_columns(
        pl.when(public).then("kind").otherwise(pl.lit(WITHHELD)).alias("kind"),
        pl.when(public).then("market_ticker").otherwise(pl.lit("")).alias("market_ticker"),
        pl.when(public).then("detail").otherwise(pl.lit("{}")).alias("detail"),
    )
    details = [
        public_detail(kind, detail) for kind, detail in kept.select("kind", "detail").iter_rows()
    ]
    return kept.with_columns(pl.Series("detail", details, pl.String)).to_arrow().cast(table.schema)


def _public_frames(table: pa.Table, published: Published) -> pa.Table:
    """The frames of public channels that have no other keys than the listed ones, byte for byte.

    A frame with a key that is not listed, at any depth, is left out: it may be of an own order. So are frames with an
    escaped character, notes (addresses, free text), errors (free text) and malformed frames.
    """
    kind = table["type"].cast(pa.string())
    public = pa.repeat(pa.scalar(value=False), table.num_rows)
    for name, keys in PUBLIC_KEYS.items():
        of_kind = pc.equal(kind, name)
        text = pl.Series(pc.if_else(of_kind, table["frame"], b"").cast(pa.binary()))
        rest = _decodable(text).str.replace_all(f'"(?:{"|".join(sorted(keys))})"\\s*:', "")
        known = ~rest.str.contains(r'"\s*:|\\').fill_null(value=True)
        known &= _decodable(text).str.contains(_PUBLIC_TYPE)
        public = pc.or_(public, pc.and_(of_kind, known.to_arrow()))
    left_out = pl.Series(kind.filter(pc.invert(public))).value_counts()
    published.removed.update(dict(left_out.iter_rows()))
    return table.filter(public)


def _decodable(frames: pl.Series) -> pl.Series:
    """The frames as text; a backslash, which no public frame has, where one is not UTF-8."""
    try:
        return frames.cast(pl.String)
    except pl.exceptions.PolarsError:
        texts = [_text_or_backslash(frame) for frame in frames.to_list()]
        return pl.Series(texts, dtype=pl.String)


def _text_or_backslash(frame: bytes) -> str:
    try:
        return frame.decode()
    except UnicodeDecodeError:
        return "\\"


def public_detail(kind: str, detail: str) -> str:
    """The `detail` of an event, reduced to the listed fields."""
    try:
        decoded = msgspec.json.decode(detail)
    except DecodeError:
        return "{}"
    if not isinstance(decoded, dict):
        return "{}"
    if kind in NOTES:
        kept = _select(decoded, NOTES[kind])
        if isinstance(kept.get("cause"), str):
            # The part after the colon is the exchange's free text.
            kept["cause"] = kept["cause"].partition(":")[0]
    else:
        kept = _select(decoded, ENVELOPE)
        body = decoded.get("msg")
        if isinstance(body, dict) and kind in FRAMES:
            kept["msg"] = _select(body, FRAMES[kind])
    return msgspec.json.encode(kept).decode()


def _select(decoded: dict[str, Any], allowed: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in decoded.items() if name in allowed}


# -- verification ------------------------------------------------------------------------------


def own_ids(archive: Archive, hour: datetime) -> set[str]:
    """The recorder's own ids in an hour of the archive that are long enough to search for."""
    decoded: set[str] = set()
    for table in archive.read(ORDERBOOK_EVENTS.name, hour, ["client_order_id"]):
        decoded.update(table["client_order_id"].cast(pa.string()).unique().to_pylist())
    for table in archive.read(STREAM_EVENTS.name, hour, ["kind", "detail"]):
        private = pc.invert(pc.is_in(table["kind"].cast(pa.string()), pa.array([*NOTES, *FRAMES])))
        for detail in table["detail"].filter(private).to_pylist():
            decoded.update(_ids_in(detail))
    return {own for own in decoded if len(own) >= MIN_SEARCHED_LENGTH}


def _ids_in(detail: str) -> Iterator[str]:
    """Yield the values of `_OWN` fields at any depth; a raw frame may be a string within."""
    try:
        pending = [msgspec.json.decode(detail)]
    except DecodeError:
        return
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            yield from (v for k, v in value.items() if k in _OWN and isinstance(v, str))
            pending.extend(value.values())
        elif isinstance(value, str) and value.startswith("{"):
            yield from _ids_in(value)


def _read_back(
    paths: Sequence[Path], dataset: Dataset, written: RowStatistics, own: Collection[str]
) -> None:
    """Raise `StoreRefused` unless the files hold exactly the written rows and no private data."""
    decoded = RowStatistics(dataset)
    for path in paths:
        for table in batches(local_file(path), dataset.arrow):
            decoded.add(table)
            for at, column in enumerate(table.schema):
                texts = _texts(table[at])
                if texts is None:
                    continue
                if own and bool(texts.str.contains_any(list(own)).any()):
                    raise StoreRefused(
                        f"{path.name} of {dataset.name}, column {column.name}, still contains an id of own"
                        " orders. The hour was not published; please report this."
                    )
                if column.name == "client_order_id" and set(texts.to_list()) - {""}:
                    raise StoreRefused(
                        f"{path.name} of {dataset.name} still contains client order ids. The hour was not"
                        " published; please report this."
                    )
    if (decoded.rows, decoded.checksum) != (written.rows, written.checksum):
        raise StoreRefused(
            f"{dataset.name}: {written.rows:,} rows of checksum {written.checksum} were written and"
            f" read as {decoded.rows:,} of {decoded.checksum}. The hour was not published. Is the disk failing?"
        )


def _texts(column: pa.ChunkedArray) -> pl.Series | None:
    """The strings of a column, including unused dictionary values; None for another type."""
    if pa.types.is_dictionary(column.type):
        return pl.Series([text for chunk in column.chunks for text in chunk.dictionary.to_pylist()])
    if pa.types.is_string(column.type):
        return pl.Series(column.unique().to_pylist(), dtype=pl.String)
    if pa.types.is_binary(column.type):
        return _decodable(pl.Series(column))
    return None
