"""What ops and sensors are given: the settings, and the rooms below, reached through them.

The rooms are imported when they are used: loading the code location opens nothing and stays fast.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from kalshi_platform import settings as platform_settings
from kalshi_platform.settings import Settings

if TYPE_CHECKING:
    from kalshi_platform.loading.hours import HourReport
    from kalshi_platform.streamer import Streamer


class KalshiResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The platform, as its settings describe it: environment variables, then `.env`."""

    overrides: dict[str, str] = Field(
        default_factory=dict,
        description="Settings that win over the environment, by lower-case name. No secrets here:"
        " the UI shows this.",
    )

    def settings(self) -> Settings:
        """The settings. Raises `SettingsError` naming the variable."""
        return platform_settings.load(**self.overrides)

    def streamer(self, shard: int) -> Streamer:
        """A streamer of one shard, not yet started."""
        from kalshi_platform.streamer import Streamer

        return Streamer(self.settings(), shard)

    def is_sealed(self, hour: datetime) -> bool:
        """Whether the archive has data of an hour, and has it whole."""
        from kalshi_platform.loading import hours

        return hours.is_sealed(self.settings().archive_dir, hour)

    def describe(self, hour: datetime) -> HourReport:
        """What the archive holds of an hour. Reads all of it."""
        from kalshi_platform.loading import hours

        return hours.describe(self.settings().archive_dir, hour, complete=self.is_sealed(hour))

    def rebuild(self, hour: datetime) -> HourReport:
        """A sealed hour, built again; the open one as it is. Raises `PlatformError` when nothing
        holds it any more.
        """
        from kalshi_platform.loading.rebuild import rebuild

        return rebuild(self.settings(), hour)

    @property
    def source(self) -> str:
        """Where the data comes from: `exchange` or `simulator`."""
        return "simulator" if self.settings().exchange.simulated else "exchange"
