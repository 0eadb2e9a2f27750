"""Sealed documents: every changed byte is noticed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.repository.document import document_hash, seal, unseal
from tests.unit.strategies import KEY, quick

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@quick(100)
@given(st.dictionaries(st.text(), values, max_size=4), st.sampled_from([None, KEY]))
def test_what_is_sealed_can_be_unsealed(drawn: dict[str, object], key: bytes | None) -> None:
    body = drawn | {"format": 1}
    data = seal(body, key)
    line, digest, nothing = data.split(b"\n")
    assert json.loads(line) == body
    assert nothing == b""
    assert unseal("d", data, key) == (body, digest.decode())
    assert document_hash(line, key) == digest.decode()


def test_every_changed_added_or_missing_byte_is_noticed() -> None:
    data = seal({"format": 1, "label": "nächtlich"}, KEY)
    for at in range(len(data)):
        for bit in (1, 0x20, 0x80):
            flipped = bytearray(data)
            flipped[at] ^= bit
            with pytest.raises(CorruptObjectError):
                unseal("d", bytes(flipped), KEY)
        with pytest.raises(CorruptObjectError):
            unseal("d", data[:at], KEY)
        with pytest.raises(CorruptObjectError):
            unseal("d", data[:at] + b"\n" + data[at:], KEY)
    with pytest.raises(CorruptObjectError):
        unseal("d", data + b"\n", KEY)


@pytest.mark.parametrize("other", [None, bytes(32)])
def test_a_document_needs_its_own_key(other: bytes | None) -> None:
    with pytest.raises(CorruptObjectError, match="do not match"):
        unseal("d", seal({"format": 1}, KEY), other)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_sound_document_of_another_version_is_not_called_damaged(version: object) -> None:
    with pytest.raises(FormatVersionError, match="not known to this version"):
        unseal("d", seal({"format": version}, KEY), KEY)


@pytest.mark.parametrize("line", [b"[1]", b"{}", b"{", b"\xff", b'"format"'])
def test_a_sealed_line_that_is_no_document_is_damaged(line: bytes) -> None:
    data = line + b"\n" + document_hash(line, KEY).encode() + b"\n"
    with pytest.raises(CorruptObjectError, match=r"^d: not a"):
        unseal("d", data, KEY)


def test_equal_bodies_make_equal_bytes() -> None:
    assert seal({"a": 1, "format": 1}, KEY) == seal({"format": 1, "a": 1}, KEY)


def test_names_that_are_not_utf8_come_back_as_they_were() -> None:
    name = b"/srv/\xff\xfe\xc3\xa9".decode("utf-8", "surrogateescape")
    body, _ = unseal("d", seal({"format": 1, "location": name}, KEY), KEY)
    assert body["location"].encode("utf-8", "surrogateescape") == b"/srv/\xff\xfe\xc3\xa9"
