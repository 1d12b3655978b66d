"""The engine's own access rights and settings constraints for its single user.

They are the second defence behind permission.py and independent of it: rights that are not granted do not exist
(sources such as URL, REMOTE or FILE, access management, SYSTEM SHUTDOWN, other table engines), and every setting of
allowed/settings_refused.txt is constant. The engine's system databases are read-only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.sax.saxutils import escape

from kalshi_platform.embedded_clickhouse import allowed

_TABLES = (
    *("SHOW", "SELECT", "INSERT", "CHECK", "OPTIMIZE", "TRUNCATE"),
    *("CREATE DATABASE", "CREATE TABLE", "CREATE VIEW", "DROP DATABASE", "DROP TABLE", "DROP VIEW"),
    *("DROP DICTIONARY", "ALTER UPDATE", "ALTER DELETE", "ALTER COLUMN", "ALTER INDEX"),
    *(
        "ALTER STATISTICS",
        "ALTER PROJECTION",
        "ALTER CONSTRAINT",
        "ALTER TTL",
        "ALTER REWRITE PARTS",
    ),
    *("ALTER MATERIALIZE TTL", "ALTER SETTINGS", "ALTER MODIFY COMMENT", "ALTER MOVE PARTITION"),
    *("ALTER VIEW MODIFY QUERY", "ALTER VIEW MODIFY REFRESH", "ALTER MODIFY DATABASE COMMENT"),
    *("SYSTEM MERGES", "SYSTEM TTL MERGES", "SYSTEM CLEANUP", "SYSTEM VIEWS"),
    *("SYSTEM WAIT LOADING PARTS", "SYSTEM LOAD PRIMARY KEY", "SYSTEM UNLOAD PRIMARY KEY"),
)
_EVERYWHERE = (
    *("CREATE TEMPORARY TABLE", "CREATE ARBITRARY TEMPORARY TABLE", "CREATE TEMPORARY VIEW"),
    *("KILL QUERY", "SYSTEM FLUSH LOGS", "SYSTEM FLUSH ASYNC INSERT QUEUE"),
    *("SYSTEM RELOAD ASYNCHRONOUS METRICS", "SYSTEM PREWARM MARK CACHE"),
    *("SYSTEM PREWARM PRIMARY INDEX CACHE", "SYSTEM DROP MARK CACHE"),
    *("SYSTEM DROP UNCOMPRESSED CACHE", "SYSTEM DROP QUERY CACHE", "SYSTEM DROP MMAP CACHE"),
    *("SYSTEM DROP COMPILED EXPRESSION CACHE", "SYSTEM DROP PRIMARY INDEX CACHE"),
    *("SYSTEM DROP QUERY CONDITION CACHE", "SYSTEM DROP SCHEMA CACHE", "SYSTEM DROP PAGE CACHE"),
)
OWN_DATABASES = ("system", "INFORMATION_SCHEMA", "information_schema")
_CHANGING = ("INSERT", "CREATE", "DROP", "ALTER", "TRUNCATE", "OPTIMIZE")

_USERS = """<clickhouse>
  <profiles><default>
    <implicit_select>0</implicit_select>
    <allow_introspection_functions>0</allow_introspection_functions>
    <!-- expressions in VALUES are evaluated only after they were checked: Engine._with_expressions -->
    <input_format_values_interpret_expressions>0</input_format_values_interpret_expressions>
    <!-- no compilation: a query's fourth run would take four times as long, to save a tenth of long scans -->
    <compile_expressions>0</compile_expressions>
    <compile_aggregate_expressions>0</compile_aggregate_expressions>
    <compile_sort_description>0</compile_sort_description>
    <!-- an INSERT's data must leave memory after it was read: see Engine.insert -->
    <storage_file_read_method>pread</storage_file_read_method>
    <constraints>{constraints}</constraints>
  </default></profiles>
  <users><default>
    <password></password>
    <profile>default</profile>
    <quota>default</quota>
    <grants>{grants}</grants>
  </default></users>
  <quotas><default/></quotas>
</clickhouse>
"""
SET_BY_US = frozenset({"input_format_values_interpret_expressions", "database"})
"""Settings that only the engine's own code sets, so they cannot be constant; the second is set on each connection."""


def users(object_store: Iterable[str]) -> str:
    """The content of the engine's users file."""
    constant = sorted(allowed.SETTINGS_REFUSED - SET_BY_US)
    return _USERS.format(
        constraints="".join(f"<{name}><const/></{name}>" for name in constant),
        grants="".join(f"<query>{escape(query)}</query>" for query in grants(object_store)),
    )


def grants(object_store: Iterable[str]) -> list[str]:
    """All granted rights, as GRANT and REVOKE statements."""
    engines = sorted(allowed.TABLE_ENGINES | allowed.DATABASE_ENGINES)
    urls = "|".join(re.escape(prefix) for prefix in object_store)
    store = [f"GRANT READ, WRITE ON S3('({urls}).*')", "GRANT TABLE ENGINE ON S3"] if urls else []
    return [
        f"GRANT {', '.join(_TABLES)} ON *.*",
        f"GRANT {', '.join(_EVERYWHERE)} ON *.*",
        *(f"GRANT TABLE ENGINE ON {engine}" for engine in engines),
        *store,
        *(f"REVOKE {', '.join(_CHANGING)} ON {database}.*" for database in OWN_DATABASES),
    ]
