"""The embedded ClickHouse: the chDB engine in this process, behind ClickHouse's HTTP interface.

What belongs here is the shell around the engine: reading a request, running it on a connection
of its own, writing the answer as ClickHouse writes it. Nothing here knows the platform's tables,
and nothing else in the platform knows this package: they meet over HTTP, and at the file of the
password (write_password.py).

    serve      blocks and serves one data folder
    running    the same in a child process, for tests
    statement  reading SQL as far as HTTP needs it
    engine     connections, sessions, cancelling
    answers    error codes, HTTP statuses, content types
    encodings  HTTP compression
    parts, failed_writes  what a full disk spoils of the tables, found and set aside
    refused    what older builds let into a data folder, and is taken out
    launch     the server's process: its options, its empty environment
    confinement, system_calls  what the process may do on the host
"""

from kalshi_platform.embedded_clickhouse.process import Running, running
from kalshi_platform.embedded_clickhouse.server import serve

__all__ = ["Running", "running", "serve"]
