"""Ciphers: published vectors of what they are made of, frozen ones of the format, every byte bound.

The frozen values were computed with the primitives alone, from the words of ``docs/format.md``.
"""

from __future__ import annotations

import hashlib
import itertools

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import CorruptObjectError, MasterKeyError, RepositoryError
from dbmodule.repository import cipher
from dbmodule.repository.cipher import (
    PIECE,
    STORED_PIECE,
    TAG_BYTES,
    KeyWrap,
    NameCipher,
    ObjectCiphers,
    derive,
    hash_key,
    plain_size,
    sealed,
)
from dbmodule.repository.secret import Secret

DATA_KEY = bytes(range(32))
SALT = bytes(range(100, 132))
PACK = "packs/ab/" + "ab" * 32


def test_the_primitives_are_those_of_their_standards() -> None:
    # BLAKE3's own test vectors, the first of them.
    context = "BLAKE3 2019-12-27 16:29:52 test vectors context"
    assert derive(context, b"").hex() == (
        "2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d"
    )
    # The GCM specification, test case 14.
    assert AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), None).hex() == (
        "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    )
    # RFC 5297, A.1.
    siv = AESSIV(bytes.fromhex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))
    found = siv.encrypt(
        bytes.fromhex("112233445566778899aabbccddee"),
        [bytes.fromhex("101112131415161718191a1b1c1d1e1f2021222324252627")],
    )
    assert found.hex() == "85632d07c6e8f37f950acd320a2ecc9340c02b9690c4dc04daef7f6afe5c"
    # RFC 7914, 12.
    made = hashlib.scrypt(
        b"pleaseletmein", salt=b"SodiumChloride", n=1 << 14, r=8, p=1, maxmem=1 << 26, dklen=64
    )
    assert made.hex().startswith("7023bdcb3afd7348461c06cd81fd38eb")


def test_what_follows_from_a_data_key_is_frozen() -> None:
    assert hash_key(DATA_KEY).hex() == (
        "06f956463de8b8d1afd88397ce124208657ef592e2cd1dbd70dc168a5128a00b"
    )
    assert NameCipher(DATA_KEY).seal("clusters", "main.json") == (
        "9a368b7f4e72a4589aa876870e72c9c6f2418e62a5c688869ab916772a5653eb"
        "d198699d37bf1322d5589f0574083fbd1b30af00604e75b39d6591578a4d0673"
    )
    short = ObjectCiphers(DATA_KEY).of("clusters/main.json", SALT)
    assert b"".join(sealed(short, [b"he", b"", b"llo"])).hex() == (
        "bb5301f45068e76ab1d94fd8686396e4002ea0e35a"
    )
    pack = b"".join(
        sealed(ObjectCiphers(DATA_KEY).of(PACK, b""), [bytes(i % 251 for i in range(PIECE + 3))])
    )
    assert len(pack) == PIECE + 3 + 2 * TAG_BYTES
    assert blake3(pack).hexdigest() == (
        "de011e4989f22dd110dd924797546e9f99653a7c134ee89638a547b744ffd1d8"
    )


def test_what_follows_from_a_master_key_is_frozen() -> None:
    wrap = KeyWrap(bytes(range(50, 82)), bytes(range(200, 232)))
    assert wrap.key_id == "6b533dc69bfe329f517dca833e24f09f"
    stored = bytes.fromhex(
        "000102030405060708090a0b444bb2d5995969bdd8e06332e5b65a2bba8114c575"
        "116747df382ed5161b7ff3330401a940c16a24f47d13db88630676"
    )
    assert wrap.unwrap(stored) == DATA_KEY
    assert wrap.unwrap(wrap.wrap(DATA_KEY)) == DATA_KEY
    assert Secret(b"correct horse battery").master_key(bytes(32)).hex() == (
        "9e3676844c1ae1c8f7438031ff9e04e1adf4f4a838a832827ffa9e3c5a7bfdd8"
    )
    assert Secret(b"0A" * 32).master_key(bytes(32)) == b"\x0a" * 32


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.integers(1, 40))
def test_pieces_do_not_depend_on_chunks(data: bytes, cuts: list[int], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cipher, "PIECE", piece)
        patch.setattr(cipher, "STORED_PIECE", piece + TAG_BYTES)
        chosen = ObjectCiphers(DATA_KEY).of("a", SALT)
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        chunks = [data[start:stop] for start, stop in itertools.pairwise(edges)]
        pieces = list(sealed(chosen, chunks))
        assert pieces == list(sealed(chosen, [data]))
        assert len(pieces) == max(1, -(-len(data) // piece))
        assert plain_size("a", sum(map(len, pieces))) == len(data)
        opened = [
            chosen.open(number, stored, last=number == len(pieces) - 1)
            for number, stored in enumerate(pieces)
        ]
        assert b"".join(part or b"" for part in opened) == data
        assert None not in opened


def test_a_piece_opens_only_where_it_belongs() -> None:
    ciphers = ObjectCiphers(DATA_KEY)
    stored = ciphers.of("a/b", SALT).seal(3, b"plain", last=False)
    assert ciphers.of("a/b", SALT).open(3, stored, last=False) == b"plain"
    for other, number, last in (
        (ciphers.of("a/c", SALT), 3, False),
        (ciphers.of("a/b", SALT[::-1]), 3, False),
        (ObjectCiphers(DATA_KEY[::-1]).of("a/b", SALT), 3, False),
        (ciphers.of("a/b", SALT), 2, False),
        (ciphers.of("a/b", SALT), 3, True),
    ):
        assert other.open(number, stored, last=last) is None
    for place in range(len(stored)):
        flipped = bytearray(stored)
        flipped[place] ^= 1
        assert ciphers.of("a/b", SALT).open(3, flipped, last=False) is None
    assert ciphers.of("a/b", SALT).open(3, b"", last=False) is None


def test_no_key_is_used_twice() -> None:
    """The same object written again has another salt, and so other bytes from the first on."""
    first, second = (ObjectCiphers(DATA_KEY).seal("a", b"same") for _ in range(2))
    assert first[:32] != second[:32]
    assert first[32:] != second[32:]
    with pytest.raises(CorruptObjectError):
        ObjectCiphers(DATA_KEY).open("b", first)


@pytest.mark.parametrize("stored", [0, 1, 15, STORED_PIECE + 1, 2 * STORED_PIECE + 15])
def test_impossible_sizes_are_damage(stored: int) -> None:
    with pytest.raises(CorruptObjectError):
        plain_size("a", stored)


def test_names_come_back_and_say_little() -> None:
    names = NameCipher(DATA_KEY)
    parts = ["a", "main.json", "20260131-235959-full-1a2b3c.json", "x" * 48, "x" * 95]
    for part in parts:
        stored = names.seal("manifests/main", part)
        assert names.open("manifests/main", stored) == part
        assert names.open("manifests/other", stored) is None
        assert names.open("manifests/main", stored[:-1] + "g") is None
        assert names.open("manifests/main", stored[2:]) is None
        assert len(stored) <= 255
    assert len({len(names.seal("m", part)) for part in parts}) == 2
    for part in ("", ".", "..", "a/b", "x" * 96, "ä"):
        with pytest.raises(RepositoryError, match="not an object name"):
            names.seal("m", part)


@pytest.mark.parametrize("text", [b"", b"\n", b"too short\r\n"])
def test_a_key_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(MasterKeyError, match="too short"):
        Secret.read(text)


def test_a_secret_is_never_shown() -> None:
    secret = Secret.read(b"correct horse battery\n")
    assert secret == Secret(b"correct horse battery")
    assert "horse" not in repr(secret) + str(secret)
    assert len(Secret.new().text) == 64
    assert Secret.new() != Secret.new()
