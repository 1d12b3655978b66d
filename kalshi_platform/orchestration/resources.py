"""The Dagster resource of ops and sensors: the settings, and entry points to the rooms below.

Those rooms are imported when they are used, so that loading the code location stays fast and opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

import dagster as dg
from dagster._core.execution.context.compute import current_execution_context
from pydantic import Field

from kalshi_platform import settings as platform_settings
from kalshi_platform.orchestration.observation import SHARD_TAG
from kalshi_platform.settings import Settings

if TYPE_CHECKING:
    from kalshi_platform.archive.hours import HourReport
    from kalshi_platform.recorder.streamer import Streamer


PARTITION_TAG = "dagster/partition"


class KalshiResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The platform, as its settings describe it: environment variables, then `.env`."""

    overrides: dict[str, str] = Field(
        default_factory=dict,
        description="Settings with precedence over the environment, by lower-case name. No secrets here:"
        " the UI shows this.",
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Self]:
        """While the resource is in use, every ClickHouse query has the run's ids in `log_comment`."""
        from kalshi_platform.clickhouse import client

        with client.called_by(lambda: identify(context)):
            yield self

    def settings(self) -> Settings:
        """Load the settings. Raises `SettingsError`, which names the variable."""
        return platform_settings.load(**self.overrides)

    def streamer(self, shard: int, shards: int) -> Streamer:
        """A streamer for one of `shards` shards, not started yet."""
        from kalshi_platform.recorder.streamer import Streamer

        return Streamer(self.settings().model_copy(update={"stream_shards": shards}), shard)

    def is_sealed(self, hour: datetime) -> bool:
        """Whether the archive has an hour, and the hour is sealed."""
        from kalshi_platform.archive import hours, open_archive

        return hours.is_sealed(open_archive(self.settings()), hour)

    def describe(self, hour: datetime) -> HourReport:
        """Describe an hour of the archive. Reads all its rows."""
        from kalshi_platform.archive import hours, open_archive

        return hours.describe(open_archive(self.settings()), hour, complete=self.is_sealed(hour))

    def rebuild(self, hour: datetime) -> HourReport:
        """Rebuild a sealed hour; an open hour is only described.

        Raises `PlatformError` if neither journal nor stores hold it any more.
        """
        from kalshi_platform.loading.rebuild import rebuild

        return rebuild(self.settings(), hour)

    def frames_expired(self, hour: datetime) -> bool:
        """Whether FRAMES_RETENTION_DAYS has deleted, or may delete, the frames of an hour."""
        days = self.settings().frames_retention_days
        return bool(days) and hour < datetime.now(UTC) - timedelta(days=days)

    @property
    def source(self) -> str:
        """The source of the data: `exchange` or `simulator`."""
        return "simulator" if self.settings().exchange.simulated else "exchange"


def identify(context: dg.InitResourceContext) -> dict[str, str]:
    """Dagster's ids of the caller: the run and its job; the op with its assets, checks and partition."""
    ids: dict[str, str] = {}
    if context.run is not None:
        ids |= {"run_id": context.run.run_id, "job": context.run.job_name}
        if partition := context.run.tags.get(PARTITION_TAG):
            ids["partition"] = partition
        if (shard := context.run.tags.get(SHARD_TAG)) is not None:
            ids["shard"] = shard
    step = current_execution_context.get()
    if step is not None:
        op = step.op_execution_context
        ids["op"] = op.op.name
        if op.has_assets_def:
            ids["assets"] = _names(op.selected_asset_keys)
        if op.selected_asset_check_keys:
            ids["checks"] = ",".join(sorted(key.name for key in op.selected_asset_check_keys))
    return {name: value for name, value in ids.items() if value}


def _names(keys: Iterable[dg.AssetKey]) -> str:
    return ",".join(sorted(key.to_user_string() for key in keys))
