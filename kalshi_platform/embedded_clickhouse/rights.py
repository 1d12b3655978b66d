"""What the engine itself lets its one user do: its access rights and settings constraints.

Both are allow-lists that know nothing of permission.py's, which they stand behind: rights that are not
granted are not there (sources such as URL, REMOTE or FILE, access management, SYSTEM SHUTDOWN, table
engines), and every setting of allowed/settings_refused.txt is constant. The engine's own databases can be
read and not be changed.
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
    <!-- expressions in VALUES are evaluated where they were looked at before: values.py -->
    <input_format_values_interpret_expressions>0</input_format_values_interpret_expressions>
    <!-- no compiling: a question's fourth run would take four times as long, for a tenth off long scans -->
    <compile_expressions>0</compile_expressions>
    <compile_aggregate_expressions>0</compile_aggregate_expressions>
    <compile_sort_description>0</compile_sort_description>
    <!-- what is read of an INSERT's data leaves memory again: see Engine.insert -->
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
"""Refused to everyone else, and so no constant; the second is set with each connection."""


def users(object_store: Iterable[str]) -> str:
    """The engine's users file."""
    constant = sorted(allowed.SETTINGS_REFUSED - SET_BY_US)
    return _USERS.format(
        constraints="".join(f"<{name}><const/></{name}>" for name in constant),
        grants="".join(f"<query>{escape(query)}</query>" for query in grants(object_store)),
    )


def grants(object_store: Iterable[str]) -> list[str]:
    """Every right, as statements."""
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
