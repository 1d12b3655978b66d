"""The allow-lists of names that SQL may use, as the engine spells them; any other name is refused.

The long lists are files in this folder, one name a line, for the engine's locked version (26.9). `*_refused.txt`
hold the engine's other names. A test checks that both together are all names of the engine, so that the names of a
new version are reviewed before they are allowed. A name is allowed if it neither leaves the process, nor reads or
writes a file, nor takes SQL as text.
"""

from __future__ import annotations

from importlib.resources import files


def _names(file: str) -> frozenset[str]:
    return frozenset((files(__package__) / file).read_text("utf-8").split())


FUNCTIONS = _names("functions.txt")
FUNCTIONS_REFUSED = _names("functions_refused.txt")
"""Refused: `file`, dictionaries (their sources are programs, files and hosts), models and remote services (`ai…`),
data of the host, and the engine's internal functions."""
SETTINGS = _names("settings.txt")
SETTINGS_REFUSED = _names("settings_refused.txt")
"""Refused: settings that name files, hosts or credentials, that hold SQL as text, that select other dialects, that
disable the engine's own checks, or that belong to engines and functions that are not allowed."""
MERGE_TREE_SETTINGS = _names("merge_tree_settings.txt")
MERGE_TREE_SETTINGS_REFUSED = _names("merge_tree_settings_refused.txt")
"""Refused: other disks than the data folder's, and replication."""

TABLE_ENGINES = frozenset(
    {"MergeTree", "ReplacingMergeTree", "SummingMergeTree", "AggregatingMergeTree"}
    | {"CollapsingMergeTree", "VersionedCollapsingMergeTree", "CoalescingMergeTree"}
    | {"Memory", "Null", "Log", "TinyLog", "StripeLog", "Set", "Join", "Buffer", "Merge"}
    | {"View", "MaterializedView", "GenerateRandom"}
)
DATABASE_ENGINES = frozenset({"Atomic", "Memory"})
TABLE_FUNCTIONS = frozenset(
    {"numbers", "numbers_mt", "zeros", "zeros_mt", "primes", "generateSeries", "generate_series"}
    | {"values", "SQLStandardValues", "null", "generateRandom", "format", "merge"}
    | {"view", "viewIfPermitted", "viewExplain"}
)
WITH_COLUMNS = frozenset({"values", "null", "generateRandom", "format", "s3"})
"""Table functions with a list of columns as an argument, as in CREATE TABLE."""
OBJECT_STORE = "s3"
"""A table function, and in upper case a table engine; both only below the object store's URLs."""
ENGINE_SETTINGS = MERGE_TREE_SETTINGS | frozenset(
    {"min_bytes_to_keep", "max_bytes_to_keep", "min_rows_to_keep", "max_rows_to_keep", "compress"}
    | {
        "persistent",
        "join_use_nulls",
        "max_rows_in_join",
        "max_bytes_in_join",
        "join_overflow_mode",
    }
    | {"join_any_take_last_row"}
)
"""Settings of tables: those of the MergeTree engines, of Memory, Set and Join."""
CREATION_SETTINGS = ENGINE_SETTINGS | (SETTINGS - MERGE_TREE_SETTINGS_REFUSED)
"""Settings in the definition of a table: the engine takes those that are no table's for settings of the query."""
REFRESH_SETTINGS = frozenset(
    {"all_replicas", "refresh_retries"}
    | {"refresh_retry_initial_backoff_ms", "refresh_retry_max_backoff_ms"}
)
CODECS = frozenset(
    {"CODEC", "NONE", "Default", "LZ4", "LZ4HC", "ZSTD", "Delta", "DoubleDelta", "Gorilla", "GCD"}
    | {"T64", "FPC", "ALP"}
)
INDEXES = frozenset(
    {"minmax", "set", "bloom_filter", "ngrambf_v1", "tokenbf_v1", "sparse_grams", "text"}
    | {"hypothesis", "vector_similarity", "basic"}
    | {"STATISTICS", "tdigest", "uniq", "minmax", "countmin", "basic"}
    | {"splitByNonAlpha", "splitByString", "ngrams", "sparseGrams", "array", "unicodeWord"}
)
"""Data-skipping indexes, statistics and the tokenizers of text indexes."""
FORMATS = frozenset(
    {"Arrow", "ArrowStream", "Avro", "BSONEachRow", "Buffers", "CSV", "CSVWithNames"}
    | {"CSVWithNamesAndTypes", "CustomSeparated", "CustomSeparatedIgnoreSpaces"}
    | {"CustomSeparatedIgnoreSpacesWithNames", "CustomSeparatedIgnoreSpacesWithNamesAndTypes"}
    | {"CustomSeparatedWithNames", "CustomSeparatedWithNamesAndTypes", "Form", "GeoJSON", "Hash"}
    | {"HiveText", "JSON", "JSONAsObject", "JSONAsString", "JSONColumns", "JSONColumnsWithMetadata"}
    | {"JSONCompact", "JSONCompactColumns", "JSONCompactEachRow", "JSONCompactEachRowWithNames"}
    | {"JSONCompactEachRowWithNamesAndTypes", "JSONCompactEachRowWithProgress"}
    | {"JSONCompactStrings", "JSONCompactStringsEachRow", "JSONCompactStringsEachRowWithNames"}
    | {"JSONCompactStringsEachRowWithNamesAndTypes", "JSONCompactStringsEachRowWithProgress"}
    | {"JSONEachRow", "JSONEachRowWithProgress", "JSONL", "JSONLines", "JSONObjectEachRow"}
    | {"JSONStrings", "JSONStringsEachRow", "JSONStringsEachRowWithProgress", "LineAsString"}
    | {"LineAsStringWithNames", "LineAsStringWithNamesAndTypes", "MD", "Markdown", "MsgPack"}
    | {"NDJSON", "Native", "Npy", "Null", "ORC", "One", "Parquet", "ParquetMetadata", "Pretty"}
    | {"PrettyCompact", "PrettyCompactMonoBlock", "PrettyCompactNoEscapes"}
    | {"PrettyCompactNoEscapesMonoBlock", "PrettyJSONEachRow", "PrettyJSONLines"}
    | {"PrettyMonoBlock", "PrettyNDJSON", "PrettyNoEscapes", "PrettyNoEscapesMonoBlock"}
    | {"PrettySpace", "PrettySpaceMonoBlock", "PrettySpaceNoEscapes"}
    | {"PrettySpaceNoEscapesMonoBlock", "Prometheus", "Raw", "RawBLOB", "RawWithNames"}
    | {"RawWithNamesAndTypes", "Regexp", "RowBinary", "RowBinaryWithDefaults"}
    | {"RowBinaryWithNames", "RowBinaryWithNamesAndTypes", "RowBinaryWithNamesAndTypesAndDefaults"}
    | {"SQLInsert", "TSKV", "TSV", "TSVRaw", "TSVRawWithNames", "TSVRawWithNamesAndTypes"}
    | {"TSVWithNames", "TSVWithNamesAndTypes", "TabSeparated", "TabSeparatedRaw"}
    | {"TabSeparatedRawWithNames", "TabSeparatedRawWithNamesAndTypes", "TabSeparatedWithNames"}
    | {"TabSeparatedWithNamesAndTypes", "Values", "Vertical", "XML"}
)
"""Formats that need neither a file of the host (a schema, a template) nor a registry."""
FORMATS_REFUSED = frozenset(
    {"AvroConfluent", "DWARF", "MySQLDump", "MySQLWire", "ODBCDriver2", "PNG", "PostgreSQLWire"}
    | {"Protobuf", "ProtobufList", "ProtobufSingle", "Puffin", "PuffinMetadata", "Template"}
    | {"TemplateIgnoreSpaces"}
)
ALTERATIONS = frozenset(
    {f"{verb}_COLUMN" for verb in ("ADD", "DROP", "MODIFY", "COMMENT", "RENAME", "MATERIALIZE")}
    | {f"{verb}_INDEX" for verb in ("ADD", "DROP", "MATERIALIZE")}
    | {f"{verb}_PROJECTION" for verb in ("ADD", "DROP", "MATERIALIZE", "MODIFY")}
    | {f"{verb}_CONSTRAINT" for verb in ("ADD", "DROP", "MODIFY")}
    | {f"{verb}_STATISTICS" for verb in ("ADD", "DROP", "MATERIALIZE", "MODIFY")}
    | {"MODIFY_ORDER_BY", "MODIFY_SAMPLE_BY", "REMOVE_SAMPLE_BY", "MODIFY_COMMENT"}
    | {"MODIFY_TTL", "REMOVE_TTL", "MATERIALIZE_TTL", "MODIFY_SETTING", "RESET_SETTING"}
    | {"MODIFY_QUERY", "MODIFY_REFRESH", "MODIFY_DATABASE_COMMENT"}
    | {"DROP_PARTITION", "DROP_DETACHED_PARTITION", "FORGET_PARTITION", "ATTACH_PARTITION"}
    | {"REPLACE_PARTITION", "MOVE_PARTITION", "DELETE", "UPDATE", "APPLY_DELETED_MASK"}
    | {"APPLY_PATCHES", "REWRITE_PARTS"}
)
SYSTEM_COMMANDS = frozenset(
    {"FLUSH_LOGS", "FLUSH_ASYNC_INSERT_QUEUE", "WAIT_LOADING_PARTS", "LOAD_PRIMARY_KEY"}
    | {
        f"{verb}_{name}"
        for verb in ("START", "STOP")
        for name in ("MERGES", "TTL_MERGES", "CLEANUP")
    }
    | {f"{verb}_VIEW" for verb in ("REFRESH", "START", "STOP", "CANCEL", "WAIT")}
    | {"START_VIEWS", "STOP_VIEWS", "UNLOAD_PRIMARY_KEY", "PREWARM_MARK_CACHE"}
    | {"PREWARM_PRIMARY_INDEX_CACHE", "RELOAD_ASYNCHRONOUS_METRICS"}
    | {f"CLEAR_{name}_CACHE" for name in ("MARK", "UNCOMPRESSED", "QUERY", "COMPILED_EXPRESSION")}
    | {f"CLEAR_{name}_CACHE" for name in ("INDEX_MARK", "INDEX_UNCOMPRESSED", "PRIMARY_INDEX")}
    | {f"CLEAR_{name}_CACHE" for name in ("QUERY_CONDITION", "MMAP", "SCHEMA", "PAGE")}
)
