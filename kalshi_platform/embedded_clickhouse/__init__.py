"""The embedded ClickHouse: the chDB engine in a process of its own, behind ClickHouse's HTTP interface.

This package is the shell around the engine: it reads a request, runs it on a connection of its own, and writes the
answer as ClickHouse does. It does not know the platform's tables, and the rest of the platform uses it only over
HTTP and through the password file (write_password.py).

    running    the server in a child process, for tests
    server     reads requests and writes answers; `serve` blocks and serves one data folder
    statement  the parsing of SQL that HTTP needs
    engine     connections, sessions, cancellation
    answers    error codes, HTTP statuses, content types
    encodings  HTTP compression
    permission, allowed, rights  which SQL may run
    parts, failed_writes  parts of tables that a full disk spoiled, found and set aside
    refused    definitions that older versions let into a data folder, taken out
    launch     the server's process: its options, its empty environment
    confinement, system_calls  what the process may do on the host
"""

from kalshi_platform.embedded_clickhouse.process import Running, running

__all__ = ["Running", "running"]
