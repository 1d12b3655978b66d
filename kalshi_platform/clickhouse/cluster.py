"""Translation of the migrations for a cluster: replicated tables on every shard, a Distributed table over them.

`CREATE TABLE t` of a migration becomes `t_local`, a Replicated table on every host, and `t`, a Distributed table
over them, which all queries use. A table with a `market_ticker` is sharded by it, so that all rows of a market are
on one shard: FINAL, argMax and the deduplication of a level's versions are then correct per shard. A table without
one is replicated whole to every host.

Only the forms of statements that the migrations use are understood; any other is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.clickhouse.ddl import Token, after_if, tokens_of
from kalshi_platform.errors import StoreRefused

__all__ = ["LOCAL", "Cluster", "Place", "place", "place_of"]

LOCAL = "_local"
SHARD_BY = "market_ticker"
SHARDING_KEY = f"cityHash64({SHARD_BY})"
DEDUPLICATION_SECONDS = 30 * 24 * 3600
"""How long a replicated table remembers insert tokens. ClickHouse 26 forgets them after an hour by default, and
a batch may be sent again days later, when ClickHouse is back."""

_WINDOW = "non_replicated_deduplication_window"
_ALTERS = {"ADD", "MODIFY", "DROP", "RENAME", "COMMENT", "CLEAR", "RESET", "REMOVE", "MATERIALIZE"}
_OF_COLUMNS = {"ADD", "MODIFY", "DROP", "RENAME", "COMMENT"}
"""ALTER … COLUMN with one of these changes what a Distributed table shows, too."""
_OF_STORAGE = {
    "SETTING",
    "TTL",
    "INDEX",
    "PROJECTION",
    "STATISTICS",
    "CONSTRAINT",
    "ORDER",
    "COLUMN",
}
_DISTRIBUTED = re.compile(r"Distributed\('(?P<cluster>[^']+)', '[^']+', '(?P<local>[^']+)'")


@dataclass
class Cluster:
    """A cluster of the server's configuration, and how a database's tables are spread over it."""

    name: str
    database: str
    sharded: dict[str, bool] = field(default_factory=dict)
    """By table of the migrations, whether it is sharded by market; else it is whole on every host."""

    @property
    def clause(self) -> str:
        """The clause with which a statement runs on the whole cluster."""
        return f"ON CLUSTER '{self.name}'"

    def spread(self, statement: str) -> list[str]:
        """The statements that do on the cluster what `statement` does on one server.

        Call it for every statement of every migration in order, also of applied ones: it learns from them
        which tables are sharded. Raises `StoreRefused` for a statement that it does not understand.
        """
        tokens = tokens_of(statement)
        match [token.text.upper() for token in tokens[:4]]:
            case ["CREATE", "TABLE", *_]:
                return self._create_table(statement, tokens)
            case ["CREATE", "VIEW", *_] | ["CREATE", "OR", "REPLACE", "VIEW"]:
                return self._create_view(statement, tokens)
            case ["CREATE", "MATERIALIZED", "VIEW", _]:
                return self._create_materialized_view(statement, tokens)
            case ["ALTER", "TABLE", *_]:
                return self._alter(statement, tokens)
            case ["DROP", "VIEW" | "TABLE", *_]:
                return self._drop(statement, tokens)
            case ["SELECT", *_] | ["INSERT", "INTO", *_]:
                return [statement]
        raise _unknown(statement)

    def _create_table(self, sql: str, tokens: Sequence[Token]) -> list[str]:
        """A replicated table, and a Distributed one over it if the table is sharded."""
        at = after_if(tokens, 2, ("IF", "NOT", "EXISTS"))
        name = tokens[at]
        _, end = _parentheses(sql, tokens, at + 1)
        engine = _index(tokens, end, "ENGINE", sql)
        kind = engine + (2 if tokens[engine + 1].text == "=" else 1)
        if not re.fullmatch(r"(?!Replicated)\w*MergeTree", tokens[kind].text) or any(
            t.says("AS") and not t.depth for t in tokens[end:]
        ):
            raise _unknown(sql)
        if kind + 1 < len(tokens) and tokens[kind + 1].text == "(":
            inside, after = _parentheses(sql, tokens, kind + 1)
            arguments = sql[inside[0].start : inside[-1].end] if inside else ""
            rest = tokens[after - 1].end
        else:
            arguments, rest = "", tokens[kind].end
        cut = any(
            t.text == SHARD_BY and t.depth == 1 and before.text in "(,"
            for before, t in zip(tokens[at + 1 : end], tokens[at + 2 : end], strict=False)
        )
        self.sharded[name.text] = cut
        path, replica = (
            (f"/clickhouse/tables/{self.name}/{{shard}}/{{database}}/{{table}}", "{replica}")
            if cut
            else (f"/clickhouse/tables/{self.name}/{{database}}/{{table}}", "{shard}-{replica}")
        )
        local = name.text + LOCAL if cut else name.text
        replicated = ", ".join(filter(None, [f"'{path}'", f"'{replica}'", arguments]))
        made = (
            f"{sql[: name.start]}{self.database}.{local} {self.clause}{sql[name.end : tokens[kind].start]}"
            f"Replicated{tokens[kind].text}({replicated}){_settings(sql[rest:])}"
        )
        if not cut:
            return [made]
        return [made, self.distributed(name.text)]

    def distributed(self, table: str) -> str:
        """The statement that creates the Distributed table `table` over `table_local`."""
        return (
            f"CREATE TABLE IF NOT EXISTS {self.database}.{table} {self.clause}"
            f" AS {self.database}.{table}{LOCAL}"
            f" ENGINE = Distributed('{self.name}', '{self.database}', '{table}{LOCAL}', {SHARDING_KEY})"
        )

    def _create_view(self, sql: str, tokens: Sequence[Token]) -> list[str]:
        at = 2 if tokens[1].says("VIEW") else 4
        name = tokens[after_if(tokens, at, ("IF", "NOT", "EXISTS"))]
        return [self._everywhere(sql, name)]

    def _create_materialized_view(self, sql: str, tokens: Sequence[Token]) -> list[str]:
        """A materialised view on each shard reads and writes local tables, since a shard has all rows of its markets."""
        at = after_if(tokens, 3, ("IF", "NOT", "EXISTS"))
        if not tokens[at + 1].says("TO"):
            raise _unknown(sql)
        changed = sql[: tokens[at].start] + f"{self.database}.{tokens[at].text} {self.clause}"
        written = tokens[at].end
        for before, token in zip(tokens[at:], tokens[at + 1 :], strict=False):
            named = self.sharded.get(token.text)
            if named is None or not before.says("TO", "FROM", "JOIN"):
                continue
            local = token.text + LOCAL if named else token.text
            changed += f"{sql[written : token.start]}{self.database}.{local}"
            written = token.end
        return [changed + sql[written:]]

    def _alter(self, sql: str, tokens: Sequence[Token]) -> list[str]:
        """ALTER the local tables, and the Distributed table as far as it shows the change."""
        name = tokens[2]
        if name.text not in self.sharded:
            raise _unknown(sql)
        begins = [
            i
            for i in range(3, len(tokens))
            if tokens[i].depth == 0
            and tokens[i].says(*_ALTERS)
            and (i == 3 or tokens[i - 1].text == ",")
        ]
        if not begins or begins[0] != 3:
            raise _unknown(sql)
        commands = []
        for begin, end in zip(begins, [*begins[1:], len(tokens) + 1], strict=True):
            verb, target = tokens[begin], tokens[begin + 1]
            text = sql[verb.start : tokens[end - 2].end]
            if target.says("COMMENT") or (target.says("COLUMN") and verb.says(*_OF_COLUMNS)):
                commands.append((text, True))
            elif target.says(*_OF_STORAGE):
                commands.append((text, False))
            else:
                raise _unknown(sql)
        local = name.text + LOCAL if self.sharded[name.text] else name.text
        altered = [
            f"ALTER TABLE {self.database}.{local} {self.clause}"
            f" {_settings(', '.join(text for text, _ in commands))}"
        ]
        shown = ", ".join(text for text, shows in commands if shows)
        if shown and self.sharded[name.text]:
            altered.append(f"ALTER TABLE {self.database}.{name.text} {self.clause} {shown}")
        return altered

    def _drop(self, sql: str, tokens: Sequence[Token]) -> list[str]:
        """DROP the view, or the table with its local tables."""
        name = tokens[after_if(tokens, 2, ("IF", "EXISTS"))]
        if tokens[1].says("VIEW"):
            return [self._everywhere(sql, name)]
        tables = (
            [name.text, name.text + LOCAL] if self.sharded.pop(name.text, False) else [name.text]
        )
        return [f"DROP TABLE IF EXISTS {self.database}.{t} {self.clause} SYNC" for t in tables]

    def _everywhere(self, sql: str, name: Token) -> str:
        return f"{sql[: name.start]}{self.database}.{name.text} {self.clause}{sql[name.end :]}"


@dataclass(frozen=True)
class Place:
    """The table that stores the rows: the table itself, or a local table on each host of a cluster."""

    table: str
    """The name of the storing table, for ALTER."""
    cluster: Cluster | None = None

    @property
    def target(self) -> str:
        """The text after ALTER TABLE."""
        if self.cluster is None:
            return self.table
        return f"{self.cluster.database}.{self.table} {self.cluster.clause}"


def place(client: Client, table: str) -> Place | None:
    """Where the rows of `table` are stored, according to the server; None if it does not exist."""
    with translated():
        found = client.query(
            "SELECT engine_full, database FROM system.tables"
            " WHERE database = currentDatabase() AND name = {table:String}",
            parameters={"table": table},
        ).first_row
    if not found:
        return None
    return place_of(table, *map(str, found))


def place_of(table: str, engine: str, database: str) -> Place:
    """Where the rows of `table` are stored, according to its `engine_full` in system.tables."""
    if over := _DISTRIBUTED.match(engine):
        return Place(over["local"], Cluster(over["cluster"], database, {table: True}))
    if kept := re.match(r"Replicated\w*\('/clickhouse/tables/([^/'{}]+)/", engine):
        return Place(table, Cluster(kept[1], database, {table: False}))
    return Place(table)


def _parentheses(sql: str, tokens: Sequence[Token], at: int) -> tuple[Sequence[Token], int]:
    """The tokens inside the parentheses that open at `at`, and the index after them."""
    if at >= len(tokens) or tokens[at].text != "(":
        raise _unknown(sql)
    depth = tokens[at].depth
    for i in range(at + 1, len(tokens)):
        if tokens[i].text == ")" and tokens[i].depth == depth:
            return tokens[at + 1 : i], i + 1
    raise _unknown(sql)


def _index(tokens: Sequence[Token], start: int, word: str, sql: str) -> int:
    for i in range(start, len(tokens) - 2):
        if tokens[i].says(word) and not tokens[i].depth:
            return i
    raise _unknown(sql)


def _settings(text: str) -> str:
    """Replace a single server's deduplication window by a replicated table's."""
    return re.sub(
        rf"\b{_WINDOW}(\s*=\s*\d+)",
        rf"replicated_deduplication_window\1,"
        rf" replicated_deduplication_window_seconds = {DEDUPLICATION_SECONDS}",
        text,
    )


def _unknown(sql: str) -> StoreRefused:
    head = " ".join(sql.split())[:80]
    return StoreRefused(
        f"Migration: this statement cannot be translated for a cluster: {head!r}."
        " Write it as the other migrations do, or unset CLICKHOUSE_CLUSTER."
    )
