"""A form has the same fields and files however its bytes arrive, and noise is refused in a sentence."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform.embedded_clickhouse.forms import Form, read_form

KIND = b"multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="query"%s\r\n\r\n%s\r\n'
END = b"--b--\r\n"


def _read(kind: bytes, body: bytes, cuts: list[int]) -> Form:
    async def pieces() -> AsyncIterator[bytes]:
        at = 0
        for cut in sorted(cuts):
            yield body[at:cut]
            at = max(at, cut)
        yield body[at:]

    def write(file: io.BytesIO, data: memoryview) -> None:
        file.write(data)

    return asyncio.run(read_form(kind, pieces(), io.BytesIO, write))  # type: ignore[arg-type]


names = st.text(st.characters(exclude_characters='"%\\', exclude_categories=["C"]), min_size=1)
near = st.lists(st.sampled_from([b"\r\n", b"--", b"\r", b"\n", b"-", b"b", b"\r\n--", b"\xff\x00"]))
contents = st.binary(max_size=200) | near.map(b"".join)


@given(
    fields=st.dictionaries(names, contents, max_size=3),
    files=st.dictionaries(names, contents, max_size=3),
    cuts=st.lists(st.integers(0, 1500), max_size=6),
)
def test_a_form_is_the_same_in_any_pieces(
    fields: dict[str, bytes], files: dict[str, bytes], cuts: list[int]
) -> None:
    parts = [(n, (None, v)) for n, v in fields.items()] + [(n, ("f", v)) for n, v in files.items()]
    if not parts:
        return
    sent = httpx.Request("POST", "http://x", files=parts)  # a client chooses the boundary
    form = _read(sent.headers["Content-Type"].encode(), sent.read(), cuts)
    assert form.fields == fields
    assert {name: file.read() for name, file in form.files.items()} == files


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"multipart/form-data", PART % (b"", b"x") + END),
        (KIND, b""),
        (KIND, b"\xff\xfe"),
        (KIND, b"--b"),
        (KIND, PART % (b"", b"x")),
        (KIND, b"--bb\r\n\r\nx" + END),
        (KIND, b"--b\r\n\r\nSELECT 1\r\n" + END),
        (KIND, PART % (b"\r\nContent-Transfer-Encoding: base64", b"U0VMRUNUIDE=") + END),
        (KIND, PART % (b"\r\nContent-Type: multipart/mixed; boundary=c", b"x") + END),
        (KIND, (PART % (b"", b"x")).replace(b"query", b"\xff") + END),
        (KIND, (PART % (b"", b"x")).replace(b"form-data", b"attachment") + END),
        (KIND, PART % (b"", b"x") + END + b"more"),
    ],
)
def test_what_is_no_form_is_refused(kind: bytes, body: bytes) -> None:
    with pytest.raises(ClickHouseError) as refused:
        _read(kind, body, list(range(len(body))))
    assert refused.value.code == 36


def test_the_fields_are_bounded_together() -> None:
    large = PART % (b"", b"x" * 1_500_000)
    for body in (large * 3 + END, b"--b\r\nX: " + b"x" * 5_000_000):
        with pytest.raises(ClickHouseError, match="bytes together"):
            _read(KIND, body, [1_000_000, 2_000_000, 4_500_000])


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_noise_is_refused_or_read(noise: bytes, cuts: list[int]) -> None:
    for body in (noise, b"--b\r\n" + noise, PART % (noise, noise) + END):
        try:
            _read(KIND, body, cuts)
        except ClickHouseError as error:
            assert error.code == 36
