"""The check whether a statement may run: an allow-list over the engine's own syntax tree.

The engine returns a statement's syntax tree as JSON (`parseQueryToJSON`). Every node must be of a kind listed
below, with listed parts only, and every name in it (functions, table functions, engines, settings, formats, …) must
be on a list of allowed/. Any other syntax is refused, and so is text that the engine would parse later; a list of
columns as an argument is therefore parsed here, too.

User-defined names are never taken for functions: tables, views and CTEs are other kinds of nodes. A view with
parameters has the syntax of a table function; it passes if the engine has no table function of that name and all its
arguments are `name = value`.

The second, independent defence are the engine's access rights and settings constraints (rights.py), the third is the
kernel (confinement.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum, auto
from typing import Any

from kalshi_platform.embedded_clickhouse import allowed
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform.embedded_clickhouse.write_password import READ_ONLY

Node = Mapping[str, Any]

_ANSWER = "format_ast settings_ast"
_NODES: Mapping[str, str] = {
    # statements that read
    "SelectWithUnionQuery": f"list_of_selects union_mode list_of_modes {_ANSWER}",
    "SelectIntersectExceptQuery": f"children final_operator {_ANSWER}",
    "ExplainQuery": f"kind settings query {_ANSWER}",
    "ShowTablesQuery": "databases clusters cluster cluster_str dictionaries settings changed temporary caches"
    f" full merges like not_like case_insensitive_like where_expression limit_length from {_ANSWER}",
    "ShowColumnsQuery": "extended full database table like not_like case_insensitive_like where_expression"
    f" limit_length {_ANSWER}",
    "ShowIndexesQuery": f"extended database table where_expression {_ANSWER}",
    "SetQuery": "is_standalone changes query_parameters default_settings",
    "UseQuery": "database",
    # statements that write
    "InsertQuery": "database table table_function columns select format settings_ast partition_by",
    "CreateQuery": "database database_ast table table_ast attach if_not_exists is_ordinary_view"
    " is_materialized_view is_populate is_create_empty is_clone_as replace_view replace_table"
    " create_or_replace is_temporary columns_list storage select as_database as_table"
    f" as_table_function targets refresh_strategy comment sql_security aliases_list {_ANSWER}",
    "AlterQuery": f"alter_object database database_ast table table_ast command_list {_ANSWER}",
    "DropQuery": "kind database database_ast table table_ast database_and_tables if_exists if_empty has_all"
    " has_tables like not_like case_insensitive_like is_dictionary is_view is_temporary sync"
    f" permanently {_ANSWER}",
    "RenameQuery": f"exchange database rename_if_cannot_exchange elements {_ANSWER}",
    "OptimizeQuery": "database table partition final deduplicate deduplicate_by_columns dry_run cleanup"
    f" manifest parts_list {_ANSWER}",
    "DeleteQuery": "database table predicate partition settings_ast",
    "UpdateQuery": "database table assignments predicate partition settings_ast",
    "CheckTableQuery": f"database table partition part_name {_ANSWER}",
    "CreateIndexQuery": f"index_decl index_name database table table_ast if_not_exists {_ANSWER}",
    "DropIndexQuery": f"index_name database table table_ast if_exists {_ANSWER}",
    "KillQueryQuery": f"kill_type where_expression sync test {_ANSWER}",
    "SystemQuery": "query_type database table tables children query_result_cache_tag schema_cache_format",
    # parts of a SELECT
    "SelectQuery": "with cte_aliases select tables prewhere where group_by having qualify window order_by interpolate"
    " limit_by limit_by_length limit_by_offset limit_by_all limit_length limit_offset limit_after"
    " limit_after_all limit_until limit_with_ties distinct recursive_with group_by_all"
    " group_by_with_cube group_by_with_rollup group_by_with_totals group_by_with_grouping_sets"
    " group_by_with_constant_keys order_by_all settings",
    "WithElement": "name subquery is_materialized aliases",
    "TablesInSelectQuery": "children",
    "TablesInSelectQueryElement": "table_expression table_join array_join",
    "TableExpression": "database_and_table_name table_function subquery final sample_size sample_offset"
    " column_aliases",
    "TableJoin": "kind locality strictness on_expression using_expression_list",
    "ArrayJoin": "kind expression_list",
    "SampleRatio": "numerator denominator",
    "OrderByElement": "expression direction nulls_direction nulls_direction_was_explicitly_specified"
    " collation with_fill fill_from fill_to fill_step fill_staleness",
    "InterpolateElement": "column expr",
    "WindowListElement": "name definition",
    "WindowDefinition": "parent_window_name partition_by order_by frame_is_default frame_type"
    " frame_begin_type frame_begin_offset frame_begin_preceding frame_end_type frame_end_offset"
    " frame_end_preceding",
    # expressions
    "ExpressionList": "children separator",
    "Subquery": "children alias cte_name",
    "Function": "name arguments parameters alias is_operator is_lambda_function is_window_function"
    " window_definition window_name nulls_action kind no_empty_args",
    "Identifier": "name name_parts alias children",
    "TableIdentifier": "name name_parts alias children",
    "Literal": "value alias",
    "QueryParameter": "name param_type alias",
    "Asterisk": "expression transformers",
    "QualifiedAsterisk": "qualifier transformers",
    "ColumnsRegexpMatcher": "pattern expression transformers",
    "ColumnsListMatcher": "column_list expression transformers",
    "QualifiedColumnsRegexpMatcher": "pattern qualifier transformers",
    "QualifiedColumnsListMatcher": "column_list qualifier transformers",
    "ColumnsTransformerList": "children",
    "ColumnsApplyTransformer": "func_name parameters lambda lambda_arg column_name_prefix",
    "ColumnsExceptTransformer": "children is_strict pattern",
    "ColumnsReplaceTransformer": "children is_strict",
    "ColumnsReplaceTransformerReplacement": "name children",
    # definitions
    "Columns definition": "columns indices constraints projections primary_key",
    "ColumnDeclaration": "name data_type default_specifier default_expression ephemeral_default comment codec"
    " ttl statistics_desc settings null_modifier primary_key_specifier collation",
    "DataType": "name arguments",
    "EnumDataType": "name values",
    "TupleDataType": "name arguments element_names",
    "NameTypePair": "name name_type",
    "IndexDeclaration": "name expression index_type granularity part_of_create_index_query",
    "ConstraintDeclaration": "name constraint_type expr",
    "ProjectionDeclaration": "name query index projection_type with_settings",
    "ProjectionSelectQuery": "with select where group_by order_by",
    "StatisticsDeclaration": "columns types",
    "Storage": "engine partition_by primary_key order_by sample_by ttl_table settings",
    "StorageOrderByElement": "children direction",
    "TTLElement": "mode destination_type if_exists ttl_expr where_expr group_by_key group_by_assignments"
    " recompression_codec",
    "ViewTargets": "targets",
    "SQLSecurity": "security_type definer",
    "UserNameWithHost": "username",
    "RefreshStrategy": "schedule_kind period offset spread append dependencies settings",
    "TimeInterval": "seconds months",
    "Assignment": "column_name children",
    "Partition": "all fields_count id value",
    "AlterCommand": "command_type replace part detach first if_exists if_not_exists clear_column clear_index"
    " clear_projection clear_statistics add_enum_values col_decl column column_position comment"
    " constraint constraint_decl from_database from_table index index_decl move_destination_type"
    " order_by partition predicate projection projection_decl refresh remove_property rename_to"
    " sample_by select settings_changes settings_resets statistics_decl to_database to_table ttl"
    " update_assignments",
}
"""Allowed kinds of nodes, each with its allowed parts; a part that is empty or false counts as absent."""

_READING = frozenset(
    {"SelectWithUnionQuery", "SelectIntersectExceptQuery", "ExplainQuery", "ShowTablesQuery"}
    | {"ShowColumnsQuery", "ShowIndexesQuery", "SetQuery", "UseQuery"}
)
_WRITING = frozenset(
    {"InsertQuery", "CreateQuery", "AlterQuery", "DropQuery", "RenameQuery", "OptimizeQuery"}
    | {"DeleteQuery", "UpdateQuery", "CheckTableQuery", "CreateIndexQuery", "DropIndexQuery"}
    | {"KillQueryQuery", "SystemQuery"}
)
_PLAIN_COLUMN = frozenset({"type", "name", "data_type", "null_modifier"})
"""Parts of a column in a list that is an argument; none of them is an expression."""
_IN = frozenset(
    f"{prefix}{name}{suffix}"
    for prefix, name in (("", "in"), ("", "notIn"), ("global", "In"), ("global", "NotIn"))
    for suffix in ("", "IgnoreSet")
)


class _Role(Enum):
    """The meaning of a function node, which depends on its position."""

    EXPRESSION = auto()
    TABLE_FUNCTION = auto()
    ENGINE = auto()
    CODEC = auto()
    INDEX = auto()


_ROLES: Mapping[tuple[str, str], _Role] = {
    ("TableExpression", "table_function"): _Role.TABLE_FUNCTION,
    ("InsertQuery", "table_function"): _Role.TABLE_FUNCTION,
    ("CreateQuery", "as_table_function"): _Role.TABLE_FUNCTION,
    ("Storage", "engine"): _Role.ENGINE,
    ("ColumnDeclaration", "codec"): _Role.CODEC,
    ("TTLElement", "recompression_codec"): _Role.CODEC,
    ("IndexDeclaration", "index_type"): _Role.INDEX,
    ("ProjectionDeclaration", "projection_type"): _Role.INDEX,
    ("ColumnDeclaration", "statistics_desc"): _Role.INDEX,
    ("StatisticsDeclaration", "types"): _Role.INDEX,
}
_SETTINGS: Mapping[tuple[str, str], Collection[str]] = {
    ("Storage", "settings"): allowed.CREATION_SETTINGS,
    ("AlterCommand", "settings_changes"): allowed.ENGINE_SETTINGS,
    ("ColumnDeclaration", "settings"): allowed.ENGINE_SETTINGS,
    ("ProjectionDeclaration", "with_settings"): allowed.ENGINE_SETTINGS,
    ("RefreshStrategy", "settings"): allowed.REFRESH_SETTINGS,
}
"""The allow-list of a SETTINGS clause by its position; elsewhere that of query settings."""


@dataclass(frozen=True)
class Known:
    """The engine's names, to distinguish a refused name from one that does not exist."""

    functions: frozenset[str] = frozenset()
    table_functions: frozenset[str] = frozenset()
    higher_order: frozenset[str] = frozenset()
    """Functions that accept a function's name instead of a lambda."""
    combinators: tuple[str, ...] = ()
    """Suffixes of aggregate functions: `sumIf` is `sum` with `If`."""


@dataclass
class Permission:
    """The rules for one engine and one object store."""

    known: Known
    parse: Callable[[str], Node]
    """Returns the engine's syntax tree of a statement."""
    object_store: tuple[str, ...] = ()
    """URL prefixes that `s3()` may reach."""
    _functions: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        lowered = {name.lower() for name in allowed.FUNCTIONS}
        self._functions = allowed.FUNCTIONS | lowered

    def require(self, tree: Node, *, reader: bool) -> None:
        """Raise `ClickHouseError` for a statement that is not allowed."""
        kind = str(tree.get("type"))
        if kind not in _READING | _WRITING:
            raise not_listed(f"the statement {kind}")
        if reader and kind not in _READING:
            raise ClickHouseError(497, "ACCESS_DENIED", f"Not allowed: {READ_ONLY}")
        self._check(tree, reader)

    def require_settings(self, names: Iterable[str]) -> None:
        """Raise `ClickHouseError` for a setting that is not allowed."""
        for name in names:
            _require_setting(name, allowed.SETTINGS)

    def require_columns(self, text: str, thing: str) -> None:
        """Refuse a list of columns with anything but names and types; `thing` is what they belong to."""
        if "\N{REPLACEMENT CHARACTER}" in text:
            raise not_listed(f"{thing} with columns that are not UTF-8")
        # the line end closes a comment
        tree = self.parse(f"CREATE TABLE t ({text}\n) ENGINE = Null")
        plain = {"type", "table", "table_ast", "columns_list", "storage"}
        extra = {part for part, value in tree.items() if value} - plain
        columns = tree.get("columns_list") or {}
        storage = {part: value for part, value in tree.get("storage", {}).items() if value}
        declared = (columns.get("columns") or {}).get("children", [])
        if (
            extra
            or storage.keys() != {"type", "engine"}
            or storage["engine"].get("name") != "Null"
            or storage["engine"].get("arguments")
            or {part for part, value in columns.items() if value} - {"type", "columns"}
            or any({p for p, value in c.items() if value} - _PLAIN_COLUMN for c in declared)
        ):
            raise not_listed(f"{thing} with columns that have more than a name and a type")

    def _check(self, tree: Node, reader: bool) -> None:
        """Check a tree without recursion, since it may be as deep as the engine's parser allows."""
        lambdas = _Lambdas(tree)
        todo: list[tuple[Node, _Role]] = [(tree, _Role.EXPRESSION)]
        while todo:
            node, role = todo.pop()
            kind = str(node.get("type"))
            if kind not in _NODES:
                raise not_listed(f"the statement, or a part of it, {kind}")
            if reader and kind in _WRITING:
                raise ClickHouseError(497, "ACCESS_DENIED", f"Not allowed: {READ_ONLY}")
            self._check_node(node, kind, role, lambdas)
            listed = _NODES[kind].split()
            for part, value in node.items():
                if part == "type" or not value:
                    continue
                if part not in listed:
                    raise not_listed(f"{kind} with {part}")
                if isinstance(value, Mapping | list) and kind != "Literal":
                    todo += self._children(node, kind, part, role)

    def _children(
        self, node: Node, kind: str, part: str, role: _Role
    ) -> Iterator[tuple[Node, _Role]]:
        """The nodes in a part of a node, with their roles; settings are checked at once."""
        value = node[part]
        if kind == "Function" and part == "arguments" and node["name"] in _IN:
            for child in value["children"]:
                table = child.get("name") in self.known.table_functions - self._functions
                yield child, _Role.TABLE_FUNCTION if table else _Role.EXPRESSION
            return
        listed = _SETTINGS.get((kind, part), allowed.SETTINGS)
        inner = _ROLES.get((kind, part), _Role.EXPRESSION)
        if kind in {"ExpressionList", "Function"} and role in {_Role.CODEC, _Role.INDEX}:
            inner = role
        for child in [value] if isinstance(value, Mapping) else value:
            if not isinstance(child, Mapping):
                continue
            if child.get("type") == "SetQuery" and kind != "ExplainQuery":
                _require_settings(child, listed)
            elif "type" in child:
                yield child, inner
            elif kind == "ViewTargets":
                yield from _inner_tables(child)

    def _check_node(self, node: Node, kind: str, role: _Role, lambdas: _Lambdas) -> None:
        """Check what is special about a kind of node."""
        if kind == "Function":
            self._check_function(node, role, lambdas)
        elif kind == "SetQuery":
            _require_settings(node, allowed.SETTINGS)
        elif kind == "ColumnsApplyTransformer" and "func_name" in node:
            self._require_function(str(node["func_name"]), lambdas)
        elif kind == "AlterCommand":
            _require(allowed.ALTERATIONS, str(node["command_type"]), "ALTER TABLE … {}")
            if node.get("move_destination_type", "TABLE") != "TABLE":
                raise not_listed(f"MOVE PARTITION TO {node['move_destination_type']}")
            for child in (node.get("settings_resets") or {}).get("children", ()):
                _require_setting(str(child.get("name")), allowed.ENGINE_SETTINGS)
        elif kind == "SystemQuery":
            _require(allowed.SYSTEM_COMMANDS, str(node["query_type"]), "SYSTEM {}")
        elif kind == "SQLSecurity" and node.get("security_type") == "NONE":
            raise not_listed("SQL SECURITY NONE")
        elif kind == "KillQueryQuery" and node.get("kill_type") not in {"Query", "Mutation"}:
            raise not_listed(f"KILL {node.get('kill_type')}")
        elif kind == "InsertQuery" and "format" in node:
            require_format(str(node["format"]))
        if "format_ast" in node:
            require_format(str(node["format_ast"].get("name")))

    def _check_function(self, node: Node, role: _Role, lambdas: _Lambdas) -> None:
        """Check a function node's name for its role."""
        name = str(node["name"])
        match role:
            case _Role.ENGINE if node.get("kind") == "DATABASE_ENGINE":
                _require(allowed.DATABASE_ENGINES, name, "the database engine {}")
            case _Role.ENGINE if name == allowed.OBJECT_STORE.upper():
                self._require_object_store(node)
            case _Role.ENGINE:
                _require(allowed.TABLE_ENGINES, name, "the table engine {}")
            case _Role.TABLE_FUNCTION:
                self._check_table_function(node, name)
            case _Role.CODEC:
                _require(allowed.CODECS, name, "the codec {}")
            case _Role.INDEX if name in allowed.INDEXES:
                pass
            case _:
                self._check_call(node, name, lambdas)

    def _check_call(self, node: Node, name: str, lambdas: _Lambdas) -> None:
        """Check a function call, and function names passed to higher-order functions."""
        if not node.get("is_lambda_function"):
            self._require_function(name, lambdas)
        for argument in _arguments(node) if name in self.known.higher_order else ():
            if argument.get("type") == "Identifier" and "name_parts" not in argument:
                called = str(argument["name"])
                if called in self.known.functions and not self._is_function(called):
                    raise not_listed(f"the function {called}")

    def _is_function(self, name: str) -> bool:
        if name in self._functions or name.lower() in self._functions:
            return True
        for ending in self.known.combinators:
            if name.endswith(ending) and name != ending:
                return self._is_function(name.removesuffix(ending))
        return False

    def _require_function(self, name: str, lambdas: _Lambdas) -> None:
        """Raise `ClickHouseError` for a function that is not allowed or does not exist."""
        if self._is_function(name) or name in lambdas.names:
            return
        if name.lower() in {known.lower() for known in self.known.functions}:
            raise not_listed(f"the function {name}")
        near = get_close_matches(name, allowed.FUNCTIONS, 2)
        meant = f" Maybe you meant: {near}." if near else ""
        raise ClickHouseError(
            46, "UNKNOWN_FUNCTION", f"Function with name `{name}` does not exist.{meant}"
        )

    def _check_table_function(self, node: Node, name: str) -> None:
        """Check a table function, or a view with parameters."""
        name = (
            "values" if name.lower() == "values" else name
        )  # the engine accepts it in capitals, too
        known = {known.lower() for known in self.known.table_functions}
        if name == allowed.OBJECT_STORE:
            self._require_object_store(node)
        elif name not in allowed.TABLE_FUNCTIONS:
            view = all(_is_named(argument) for argument in _arguments(node))
            if name.lower() in known or not view:
                raise not_listed(f"the table function {name}")
        if name in allowed.WITH_COLUMNS:
            self._check_columns(node, name)

    def _check_columns(self, node: Node, name: str) -> None:
        """Check the lists of columns among the arguments, which are text that the engine would parse later."""
        arguments = _arguments(node)
        if name == "format" and arguments:
            require_format(str(_text(arguments[0]) or arguments[0].get("name")))
            lists = arguments[1:-1]  # the last is data
        elif name == "values":
            first = arguments[:1] if len(arguments) > 1 else []
            lists = [a for a in first if not _is_row(a)]
        elif name == allowed.OBJECT_STORE:
            lists = [a for a in arguments[1:] if len((_text(a) or "two words").split()) > 1]
        else:
            lists = arguments[:1]
        for argument in lists:
            text = _text(argument)
            if text is None:
                raise not_listed(f"{name}() with an argument that is not a plain text")
            self.require_columns(text, f"{name}()")

    def _require_object_store(self, node: Node) -> None:
        """Refuse an `s3()` whose URL is not below the archive's."""
        arguments = _arguments(node)
        url = _text(arguments[0]) if arguments else None
        if not self.object_store:
            raise not_listed(f"{node['name']}() without an archive on object storage (PARQUET_DIR)")
        if url is None or not url.startswith(self.object_store) or ".." in url:
            raise not_listed(
                f"{node['name']} of an address that is not in the archive's bucket"
                f" ({', '.join(self.object_store)})"
            )


class _Lambdas:
    """The names that a statement gives to lambdas; collected only when a function name is unknown."""

    def __init__(self, tree: Node) -> None:
        self._tree = tree
        self._names: frozenset[str] | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names: `f` of `WITH x -> x + 1 AS f`."""
        if self._names is None:
            self._names = frozenset(
                str(node["alias"])
                for node in _all(self._tree)
                if node.get("is_lambda_function") and node.get("alias")
            )
        return self._names


def _all(tree: Node) -> Iterator[Node]:
    """Every node below a value, in any order."""
    todo: list[Any] = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, Mapping):
            yield value
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def _inner_tables(target: Node) -> Iterator[tuple[Node, _Role]]:
    """The table that a materialized view creates itself."""
    for part, value in target.items():
        if part in {"inner_engine", "inner_columns"}:
            yield value, _Role.EXPRESSION
        elif value and part not in {"kind", "table_database", "table_name"}:
            raise not_listed(f"a view with {part}")
    if target.get("kind") != "To":
        raise not_listed(f"a view with {target.get('kind')}")


def _arguments(node: Node) -> list[Node]:
    return list((node.get("arguments") or {}).get("children", ()))


def _text(argument: Node) -> str | None:
    """The value of a text literal; None for any other argument."""
    value = argument.get("value")
    if argument.get("type") == "Literal" and isinstance(value, Mapping):
        return str(value["value"]) if value.get("field_type") == "String" else None
    return None


def _is_row(argument: Node) -> bool:
    """Whether an argument is a row of `values()`: a literal other than a text, or a tuple of expressions."""
    kind, text = argument.get("type"), _text(argument)
    return (kind == "Literal" and text is None) or argument.get("name") in {"tuple", "array"}


def _is_named(argument: Node) -> bool:
    """Whether an argument has the form `name = value`."""
    inner = _arguments(argument)
    return (
        argument.get("name") == "equals"
        and len(inner) == 2
        and inner[0].get("type") == "Identifier"
    )


def _require_settings(node: Node, listed: Collection[str]) -> None:
    """Check the names in a SET or SETTINGS node."""
    for change in node.get("changes") or ():
        _require_setting(str(change["name"]), listed)
        if change["value"].get("field_type") == "CustomType":
            raise not_listed(f"the setting {change['name']} with a value of its own kind")
    for name in node.get("default_settings") or ():
        _require_setting(str(name), listed)
    extra = {part for part, value in node.items() if value}
    if extra := extra - {"type", *_NODES["SetQuery"].split()}:
        raise not_listed(f"SET with {min(extra)}")


def _require_setting(name: str, listed: Collection[str]) -> None:
    if name not in listed:
        if name in allowed.SETTINGS_REFUSED | allowed.MERGE_TREE_SETTINGS_REFUSED:
            raise not_listed(f"the setting {name}")
        raise ClickHouseError(115, "UNKNOWN_SETTING", f"Unknown setting '{name}'")


def require_format(name: str) -> None:
    """Raise `ClickHouseError` for a format that is not allowed."""
    if name.lower() not in _FORMATS:
        if name.lower() in {refused.lower() for refused in allowed.FORMATS_REFUSED}:
            raise not_listed(f"the format {name}")
        raise ClickHouseError(73, "UNKNOWN_FORMAT", f"Unknown format {name}")


_FORMATS = frozenset(name.lower() for name in allowed.FORMATS)


def _require(listed: Collection[str], name: str, template: str) -> None:
    if name not in listed:
        raise not_listed(template.format(name.replace("_", " ")))


def not_listed(thing: str) -> ClickHouseError:
    """The refusal of a thing, named as the client wrote it."""
    return ClickHouseError(
        497,
        "ACCESS_DENIED",
        f"{thing[0].upper()}{thing[1:]} is not on the list of what the embedded ClickHouse runs:"
        " docs/embedded-clickhouse.md. A ClickHouse server (CLICKHOUSE_URL) runs it",
    )
