"""Dagster's database migration scripts, read once per process.

Each `DagsterInstance` compares the revision of its three databases with the newest migration script. Alembic executes
every script to find that one, about 0.1 s of CPU. The code server makes an instance for each tick of each sensor.
"""

from __future__ import annotations

import functools

from dagster._core.storage import sql


class KeptScriptDirectory:
    """In the place of Alembic's class in `dagster._core.storage.sql`."""

    from_config = staticmethod(functools.cache(vars(sql)["ScriptDirectory"].from_config))


def keep() -> None:
    """Read the scripts of each database once from now on. Dagster holds a lock where it uses them."""
    vars(sql)["ScriptDirectory"] = KeptScriptDirectory
