"""Streaming HTTP compression and decompression: gzip, deflate, lz4 (frame) and zstd."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol, cast

import lz4.frame
import zstandard

from kalshi_platform.embedded_clickhouse.answers import ClickHouseError

PREFERENCE = ("lz4", "zstd", "gzip", "deflate")
"""Order of preference among the encodings that the client accepts; ClickHouse's own."""

STEP_BYTES, STEP_BYTES_ZSTD = 16_384, 256
"""Bytes of a body that are unpacked at a time, to at most about 16 MiB: four bytes of zstd can unpack to 128 KiB."""
_GZIP_WBITS = 16 + zlib.MAX_WBITS


class Compressor(Protocol):
    """Takes pieces, gives pieces; `flush` gives the rest."""

    def compress(self, data: bytes, /) -> bytes:
        """The next piece, compressed; may be empty."""

    def flush(self) -> bytes:
        """The rest of the output."""


class _Lz4:
    """lz4's frame compressor, with the frame header before the first piece."""

    def __init__(self) -> None:
        self._frame = lz4.frame.LZ4FrameCompressor(auto_flush=False)
        self._begun = False

    def compress(self, data: bytes) -> bytes:
        head = b"" if self._begun else cast(bytes, self._frame.begin())
        self._begun = True
        return head + cast(bytes, self._frame.compress(data))

    def flush(self) -> bytes:
        return (b"" if self._begun else cast(bytes, self._frame.begin())) + cast(
            bytes, self._frame.flush()
        )


def choose_encoding(accept_encoding: str) -> str | None:
    """The encoding for an answer; None if the client accepts none of `PREFERENCE`."""
    accepted = {
        name.strip().lower()
        for part in accept_encoding.split(",")
        for name, _, weight in [part.partition(";")]
        if weight.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    }
    return next((name for name in PREFERENCE if name in accepted), None)


def compressor(encoding: str) -> Compressor:
    """A new compressor for one of `PREFERENCE`."""
    if encoding == "gzip":
        return zlib.compressobj(level=3, wbits=_GZIP_WBITS)
    if encoding == "deflate":
        return zlib.compressobj(level=3)
    if encoding == "zstd":
        return cast(Compressor, zstandard.ZstdCompressor(level=1).compressobj())
    return _Lz4()


class Decompressor:
    """A streaming decompressor of a request body, which may consist of several frames."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._new()

    def _new(self) -> None:
        self._current: Any
        match self._encoding:
            case "gzip" | "x-gzip":
                self._current = zlib.decompressobj(wbits=_GZIP_WBITS)
            case "deflate":
                self._current = zlib.decompressobj()
            case "lz4":
                self._current = lz4.frame.LZ4FrameDecompressor()
            case "zstd":
                self._current = zstandard.ZstdDecompressor().decompressobj()
            case other:
                raise ClickHouseError(
                    48,
                    "NOT_IMPLEMENTED",
                    f"Content-Encoding {other!r} is not supported; use gzip, deflate, lz4 or zstd",
                )
        self._fresh = True

    def decompress(self, data: bytes) -> Iterator[bytes]:
        """Decompress the next bytes of the body, in pieces of bounded size.

        Raises `ClickHouseError` for bytes that are not valid in the encoding.
        """
        step = STEP_BYTES_ZSTD if self._encoding == "zstd" else STEP_BYTES
        for begin in range(0, len(data), step):
            rest = data[begin : begin + step]
            try:
                while rest:
                    if self._current.eof:
                        self._new()
                    unpacked = self._current.decompress(rest)
                    self._fresh = False
                    rest = (self._current.unused_data or b"") if self._current.eof else b""
                    yield unpacked
            except (zlib.error, RuntimeError, zstandard.ZstdError) as error:
                raise self._broken(str(error)) from error

    def finish(self) -> None:
        """Raise `ClickHouseError` if the body ends within a frame."""
        if not self._fresh and not self._current.eof:
            raise self._broken("it ends too early")

    def _broken(self, why: str) -> ClickHouseError:
        return ClickHouseError(
            271, "CANNOT_DECOMPRESS", f"The request body is not valid {self._encoding}: {why}"
        )
