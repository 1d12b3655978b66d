"""Errors in the format of the answer (`http_write_exception_in_output_format`): JSON and XML stay valid.

The forms are those of ClickHouse. An answer that is a document has no rows then: the engine builds it in memory and
drops it when the query fails. In a stream the error is the last row.
"""

from __future__ import annotations

import json
from xml.sax.saxutils import escape

_DOCUMENTS = {"json", "jsoncompact", "jsonstrings", "jsoncompactstrings"}
_OBJECTS = (
    {"jsoneachrow", "jsonl", "jsonlines", "ndjson", "jsonstringseachrow"}
    | {
        "jsoneachrowwithprogress",
        "jsonstringseachrowwithprogress",
        "jsoncompacteachrowwithprogress",
    }
    | {"jsoncompactstringseachrowwithprogress"}
    | {"prettyjsoneachrow", "prettyjsonlines", "prettyndjson"}
)
_ARRAYS = {
    f"jsoncompact{strings}eachrow{names}"
    for strings in ("", "strings")
    for names in ("", "withnames", "withnamesandtypes")
}


def formatted_error(text: str, output_format: str) -> bytes | None:
    """The answer of a query that failed without a row, or the last row of one that failed later.

    None for a format that cannot carry an error.
    """
    name = output_format.lower()
    quoted = json.dumps(text, ensure_ascii=False)
    if name in _OBJECTS:
        answer = f'{{"exception": {quoted}}}\n'
    elif name in _ARRAYS:
        answer = f"[{quoted}]\n"
    elif name in _DOCUMENTS:
        answer = f'{{\n\t"meta":\n\t[\n\n\t],\n\n\t"data":\n\t[\n\n\t],\n\n\t"rows": 0,\n\n\t"exception": {quoted}\n}}\n'
    elif name == "jsonobjecteachrow":
        answer = f'{{\n\t"exception": {quoted}\n}}\n'
    elif name == "xml":
        answer = (
            "<?xml version='1.0' encoding='UTF-8' ?>\n<result>\n\t<meta>\n\t\t<columns>\n\t\t</columns>\n\t</meta>\n"
            f"\t<data>\n\t</data>\n\t<rows>0</rows>\n\t<exception>{escape(text)}</exception>\n</result>\n"
        )
    else:
        return None
    return answer.encode()
