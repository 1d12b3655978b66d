"""Reads multipart/form-data as it arrives: plain fields into memory, files into temporary files.

The bytes of both are left as they are: what must be text is decoded by the caller. A form is bounded in its fields'
bytes, its files' bytes and their number, so that one of any size uses bounded memory and disk space.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import IO

from kalshi_platform.embedded_clickhouse.answers import ClickHouseError, decoded

LONGEST_FIELDS_BYTES = 4 * 1024 * 1024
"""All plain fields of a form together, and the headers of its parts."""
LONGEST_FILES_BYTES = 256 * 1024 * 1024
"""All files of a form together, decompressed."""
MOST_FILES = 64

_BOUNDARY = re.compile(rb';\s*boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
_DISPOSITION = re.compile(rb'\s*form-data\s*((?:;\s*[\w*-]+\s*=\s*(?:"[^"]*"|[^";]*))*);?\s*\Z')
_PARAMETER = re.compile(rb';\s*([\w*-]+)\s*=\s*(?:"([^"]*)"|([^";]*))')
_PLAIN_ENCODINGS = {b"", b"binary", b"7bit", b"8bit"}


@dataclass
class Form:
    """The fields and files of a form by name; the last one of a name counts."""

    fields: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, IO[bytes]] = field(default_factory=dict)


async def read_form(
    content_type: bytes,
    body: AsyncIterator[bytes],
    new_file: Callable[[], IO[bytes]],
    write: Callable[[IO[bytes], memoryview], None],
) -> Form:
    """Read the form in a body with this Content-Type; `write` appends to a file of `new_file`.

    Raises `ClickHouseError` for a body that is no form, or one that is too large.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise _malformed("its Content-Type has no boundary")
    reader = _Reader(body, b"\r\n--" + (found[1] or found[2]))
    form = Form()
    fields_bytes = files_bytes = files = 0
    async for _ in reader.until(reader.delimiter):
        pass  # text before the first part means nothing
    while await reader.another_part():
        head = bytearray()
        async for piece in reader.until(b"\r\n\r\n"):
            head += piece
            _require_fields(fields_bytes + len(head))
        fields_bytes += len(head)
        name, is_file = _described(bytes(head))
        if is_file:
            files += 1
            if files > MOST_FILES:
                raise ClickHouseError(
                    36, "BAD_ARGUMENTS", f"A form may have {MOST_FILES} files, this one has more"
                )
            file = form.files[name] = new_file()
            async for piece in reader.until(reader.delimiter):
                files_bytes += len(piece)
                if files_bytes > LONGEST_FILES_BYTES:
                    raise ClickHouseError(
                        307,
                        "TOO_MANY_BYTES",
                        f"The files of a form may have {LONGEST_FILES_BYTES} bytes together, these have more:"
                        " insert the data into a table first",
                    )
                write(file, memoryview(piece))
            file.seek(0)
        else:
            content = bytearray()
            async for piece in reader.until(reader.delimiter):
                content += piece
                _require_fields(fields_bytes + len(content))
            fields_bytes += len(content)
            form.fields[name] = bytes(content)
    await reader.require_end()
    return form


def _require_fields(size: int) -> None:
    if size > LONGEST_FIELDS_BYTES:
        raise ClickHouseError(
            62,
            "SYNTAX_ERROR",
            f"The fields of a form may have {LONGEST_FIELDS_BYTES} bytes together, these have more",
        )


def _described(head: bytes) -> tuple[str, bool]:
    """The name of a part, and whether it is a file, from its headers."""
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n"))
    }
    if headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
        raise _malformed("a part has a Content-Transfer-Encoding")
    disposition = _DISPOSITION.match(headers.get(b"content-disposition", b""))
    parameters = {
        name.lower(): quoted or plain
        for name, quoted, plain in _PARAMETER.findall(disposition[1] if disposition else b"")
    }
    if not parameters.get(b"name"):
        raise _malformed("a part has no name")
    if headers.get(b"content-type", b"").lower().startswith(b"multipart/"):
        raise _malformed("a part is a form itself")
    name = decoded(parameters[b"name"], "The name of a form's field")
    return name, bool(parameters.keys() & {b"filename", b"filename*"})


def _malformed(why: str) -> ClickHouseError:
    return ClickHouseError(36, "BAD_ARGUMENTS", f"The body is not a valid multipart form: {why}")


class _Reader:
    """Splits a body at marks, holding only what may be the beginning of one."""

    def __init__(self, body: AsyncIterator[bytes], delimiter: bytes) -> None:
        self._body = body
        self._buffer = bytearray(b"\r\n")  # the first delimiter has no line before it
        self.delimiter = delimiter
        """The bytes between two parts."""

    async def until(self, mark: bytes) -> AsyncIterator[bytes]:
        """The bytes before the next `mark`, in pieces; the mark is skipped."""
        while (at := self._buffer.find(mark)) < 0:
            if safe := max(0, len(self._buffer) + 1 - len(mark)):
                yield bytes(self._buffer[:safe])
                del self._buffer[:safe]
            await self._more()
        yield bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]

    async def another_part(self) -> bool:
        """Whether a part follows the delimiter that was just skipped."""
        while len(self._buffer) < 2:
            await self._more()
        if self._buffer.startswith(b"--"):
            del self._buffer[:2]
            return False
        if not self._buffer.startswith(b"\r\n"):
            raise _malformed("its boundary is part of a longer line")
        return True  # the line end stays: it may be the first half of the headers' end

    async def require_end(self) -> None:
        """Read the rest of the body, which must be blank."""
        rest = bytes(self._buffer)
        while not rest.strip():
            following = await anext(self._body, None)
            if following is None:
                return
            rest = following
        raise _malformed("it continues after its end")

    async def _more(self) -> None:
        piece = await anext(self._body, None)
        if piece is None:
            raise _malformed("it ends too early")
        self._buffer += piece
