"""SQL that tries to get out: statements put together from the engine's own words.

A script of bytes takes a statement and changes some of its tokens: to a keyword of the engine, a
function, a table function, an engine, a format, to a token of another statement, or to a place that must
not be reached. The host has a file with a secret, a folder where a program or a file would be seen, and
a port that counts who connects.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from kalshi_platform_tests.embedded_clickhouse import list_alone
from kalshi_platform_tests.embedded_clickhouse.attacks import ATTACKS

Run = Callable[[bytes], None]

SECRET = "secret-of-the-host"
PLAIN = [
    "SELECT a, count() FROM t WHERE a IN (SELECT a FROM t) GROUP BY a ORDER BY a LIMIT 3 FORMAT JSON",
    "WITH x AS (SELECT 1 AS b) SELECT arrayMap(y -> y + b, [1, 2]) FROM x SETTINGS max_threads = 1",
    "CREATE TABLE n (a String, b Int8 DEFAULT 1) ENGINE = MergeTree ORDER BY a TTL now() + INTERVAL 1 DAY",
    "CREATE OR REPLACE VIEW v AS SELECT * FROM t",
    "CREATE MATERIALIZED VIEW m TO t AS SELECT a FROM t",
    "INSERT INTO t SELECT toString(number) FROM numbers(3)",
    "INSERT INTO t VALUES ('a'), (concat('b', 'c'))",
    "ALTER TABLE t ADD COLUMN IF NOT EXISTS c String DEFAULT 'x'",
    "EXPLAIN PLAN SELECT * FROM t",
    "SYSTEM FLUSH LOGS",
    "RENAME TABLE t TO u",
    "OPTIMIZE TABLE t FINAL",
]
TOKEN = re.compile(r"'(?:[^'\\]|\\.)*'|`[^`]*`|[A-Za-z_][A-Za-z_0-9]*|\d+|\s+|.", re.DOTALL)
ANSWER_S = 20.0
LIMITS = {"max_execution_time": "2", "max_memory_usage": "200000000", "max_result_rows": "1000"}
WORDS = (
    "SELECT keyword FROM system.keywords",
    "SELECT name FROM system.functions",
    "SELECT name FROM system.table_functions",
    "SELECT name FROM system.table_engines",
    "SELECT name FROM system.database_engines",
    "SELECT name FROM system.formats",
    "SELECT name FROM system.settings WHERE name LIKE '%path%' OR name LIKE '%format%' OR name LIKE '%url%'",
)
"""Of the engine; a change takes one of these lists first, and then a word of it."""


@dataclass(frozen=True)
class Host:
    """What SQL must neither read nor change nor reach."""

    folder: Path
    listener: socket.socket

    @property
    def places(self) -> dict[str, str]:
        """What the attacks name, and where that is."""
        port = self.listener.getsockname()[1]
        return {
            "/etc/passwd": f"{self.folder}/secret",
            "/tmp/x": f"{self.folder}/made",
            "127.0.0.1:1": f"127.0.0.1:{port}",
            "'env'": f"'touch {self.folder}/ran'",
        }

    def check(self, answer: str, sql: str) -> None:
        """Raise where something was read, made, run or reached."""
        assert SECRET not in answer, f"read a file: {sql}"
        assert [path.name for path in self.folder.iterdir()] == ["secret"], f"made a file: {sql}"
        assert (self.folder / "secret").read_text() == SECRET, f"changed a file: {sql}"
        try:
            self.listener.accept()
        except BlockingIOError:
            return
        raise AssertionError(f"connected: {sql}")


@contextmanager
def host() -> Iterator[Host]:
    """One for a run."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        folder = Path(name)
        (folder / "secret").write_text(SECRET)
        yield Host(folder, listener)


def statement(data: bytes, words: Sequence[Sequence[str]]) -> str:
    """The statement that a script makes: which one, then (what to do, where, which list, which word)."""
    numbers = iter(data)
    seeds = [*ATTACKS, *PLAIN]
    tokens = TOKEN.findall(seeds[_pair(numbers) % len(seeds)])
    for step in numbers:
        at = _pair(numbers) % (len(tokens) + 1)
        group, which = next(numbers, 0) % (len(words) + 2), _pair(numbers)
        if group < len(words):
            new = [words[group][which % len(words[group])]]
        else:  # of another statement
            other = TOKEN.findall(seeds[which % len(seeds)])
            new = other[which // len(seeds) % len(other) :][: 1 + step // 16]
        match step % 3:
            case 0:
                tokens[at : at + 1] = new
            case 1:
                tokens[at:at] = [" ", *new, " "]
            case _:
                del tokens[at : at + 1 + step // 64]
    return "".join(tokens)


def _pair(numbers: Iterator[int]) -> int:
    return next(numbers, 0) * 256 + next(numbers, 0)


@contextmanager
def escape() -> Iterator[Run]:
    """No statement that the list lets through reads, makes, runs or reaches anything outside."""
    with (
        host() as outside,
        tempfile.TemporaryDirectory() as data,
        list_alone.running(Path(data)) as url,
        httpx.Client(timeout=ANSWER_S, verify=False) as web,  # plain HTTP: no certificates to load
    ):
        words = [sorted(web.post(url, content=sql).text.split("\n")[:-1]) for sql in WORDS]
        assert all(len(each) > 3 for each in words)
        table = "CREATE TABLE IF NOT EXISTS t (a String) ENGINE = Memory"

        def run(script: bytes) -> None:
            web.post(url, content=table)
            sql = statement(script, words)
            for name, place in outside.places.items():
                sql = sql.replace(name, place)
            try:
                answer = web.post(url, params=LIMITS, content=sql.encode(errors="replace")).text
            except httpx.TimeoutException:
                answer = "none"
            outside.check(answer, sql)
            assert answer != "none", f"no answer: {sql}"
            assert url.process.poll() is None, f"the engine ended: {sql}"

        yield run


SEEDS = [bytes([n >> 8, n & 255]) for n in range(len(ATTACKS) + len(PLAIN))]
