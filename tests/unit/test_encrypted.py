"""The encrypting store: whatever is done to what it stores is noticed, and it tells nothing."""

from __future__ import annotations

import random

import pytest

from dbmodule.errors import CorruptObjectError, ObjectMissingError
from dbmodule.repository.cipher import PIECE, SALT_BYTES, STORED_PIECE
from dbmodule.repository.encrypted import EncryptedStore
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from dbmodule.storage.memory import MemoryStore

DATA_KEY = bytes(range(32))
PACK = "packs/ab/" + "ab" * 32
NAMES = ("index/segment", PACK)
SIZES = (0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 5)


class Pair:
    """An encrypting store and the store below it."""

    def __init__(self) -> None:
        self.below = MemoryStore()
        self.store = EncryptedStore(self.below, DATA_KEY, plain=("plain/",))

    def fresh(self) -> EncryptedStore:
        """As another process would open it."""
        return EncryptedStore(self.below, DATA_KEY, plain=("plain/",))

    def replace(self, name: str, stored: bytes) -> None:
        below = self.store.stored_name(name)
        self.below.delete(below)
        self.below.put_new(below, [stored])

    def stored(self, name: str) -> bytes:
        return self.below.get(self.store.stored_name(name))


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_ranges_are_those_of_the_plain_bytes(pair: Pair, name: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert pair.store.put_new(name, [data[:100], data[100:]]) == size
    edges = {0, 1, size, size + 1, size + PIECE}
    edges |= {n * PIECE + more for n in range(4) for more in (-1, 0, 1)}
    edges = {edge for edge in edges if edge >= 0}
    for offset in edges:
        for store in (pair.store, pair.fresh()):
            assert store.get(name, offset) == data[offset:]
            for length in edges:
                assert store.get(name, offset, length) == data[offset : offset + length]
            assert store.size(name) == size


@pytest.mark.parametrize("name", NAMES)
def test_every_changed_byte_is_noticed(pair: Pair, name: str) -> None:
    data = random.Random(1).randbytes(2 * PIECE + 40)
    pair.store.put_new(name, [data])
    whole = pair.stored(name)
    salt = len(whole) - len(data) - 48
    places = [*range(salt), salt, salt + STORED_PIECE - 1, salt + STORED_PIECE, len(whole) - 1]
    places += random.Random(2).sample(range(len(whole)), 50)
    for place in places:
        pair.replace(name, whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CorruptObjectError):
            pair.store.get(name)
        piece = max(0, place - salt) // STORED_PIECE
        for number in range(3):
            if place < salt or number == piece:
                with pytest.raises(CorruptObjectError):
                    pair.fresh().get(name, number * PIECE, 10)
            else:
                found = pair.fresh().get(name, number * PIECE, 10)
                assert found == data[number * PIECE :][:10]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_or_longer_is_noticed(pair: Pair, name: str) -> None:
    data = random.Random(1).randbytes(3 * PIECE)
    pair.store.put_new(name, [data])
    whole = pair.stored(name)
    salt = len(whole) - 3 * STORED_PIECE
    ends = [salt + n * STORED_PIECE + more for n in range(3) for more in (0, 1, 16, 17)]
    for end in (0, *ends, len(whole) - 1):
        pair.replace(name, whole[:end])
        for store in (pair.store, pair.fresh()):
            with pytest.raises(CorruptObjectError):
                store.get(name)
            with pytest.raises(CorruptObjectError):
                store.get(name, 0, 3 * PIECE)
    for more in (b"\0", whole[-STORED_PIECE:], bytes(STORED_PIECE)):
        pair.replace(name, whole + more)
        with pytest.raises(CorruptObjectError):
            pair.fresh().get(name)
    # Pieces in another order, and one left out of the middle.
    pieces = [whole[salt + n * STORED_PIECE :][:STORED_PIECE] for n in range(3)]
    for order in ([1, 0, 2], [0, 2], [2], [0, 1, 1, 2]):
        pair.replace(name, whole[:salt] + b"".join(pieces[n] for n in order))
        with pytest.raises(CorruptObjectError):
            pair.fresh().get(name)


def test_objects_cannot_take_each_others_place(pair: Pair) -> None:
    for name in ("locks/a", "locks/b", "holds/a"):
        pair.store.put_new(name, [name.encode()])
    for one, other in (("locks/a", "locks/b"), ("locks/a", "holds/a")):
        pair.replace(one, pair.stored(other))
        with pytest.raises(CorruptObjectError):
            pair.store.get(one)


def test_another_key_reads_nothing(pair: Pair) -> None:
    pair.store.put_new("locks/a", [b"content"])
    pair.store.put_new(PACK, [b"content"])
    other = EncryptedStore(pair.below, DATA_KEY[::-1], plain=())
    assert list(other.list("locks/")) == []
    with pytest.raises(ObjectMissingError):
        other.get("locks/a")
    with pytest.raises(CorruptObjectError):
        other.get(PACK)


def test_nothing_is_stored_in_the_clear(pair: Pair) -> None:
    names = ["clusters/orders.json", "manifests/orders/20260131-235959-full-1a2b3c.json", PACK]
    for name in names:
        pair.store.put_new(name, [b"orders" * 1000])
    below = {name: pair.below.get(name) for name in pair.below.list("")}
    for name, stored in below.items():
        for told in ("orders", "2026", "full", "json"):
            assert told not in name
            assert told.encode() not in stored
    lengths = {len(part) for name in below for part in name.split("/")[1:] if len(part) > 64}
    assert lengths == {128}


def test_equal_objects_are_not_seen_to_be_equal(pair: Pair) -> None:
    """But packs, which are written once under a name that stands for their content."""
    pair.store.put_new("locks/a", [b"same"])
    first = pair.stored("locks/a")
    pair.store.delete("locks/a")
    pair.store.put_new("locks/a", [b"same"])
    second = pair.stored("locks/a")
    assert first[:SALT_BYTES] != second[:SALT_BYTES]
    assert first[SALT_BYTES:] != second[SALT_BYTES:]


def test_an_object_that_was_written_anew_by_another_is_read(pair: Pair) -> None:
    """Its salt is another one, whatever is remembered of the one before."""
    data = random.Random(1).randbytes(2 * PIECE)
    pair.store.put_new("index/a", [data])
    assert pair.store.get("index/a", PIECE, 5) == data[PIECE:][:5]
    other = pair.fresh()
    other.delete("index/a")
    other.put_new("index/a", [data])
    assert pair.store.get("index/a", PIECE, 5) == data[PIECE:][:5]


def test_strangers_are_named_and_left_out(pair: Pair) -> None:
    pair.store.put_new("locks/a", [b"."])
    below = pair.store.stored_name("locks/a")
    for stranger in ("locks/a", "locks/" + "ab" * 64, below + "/b", "holds/" + below[6:]):
        other = Pair()
        other.below.put_new(below, [pair.below.get(below)])
        other.below.put_new(stranger, [b"."])
        assert other.store.strangers() == [stranger]
        assert list(other.store.list("")) == list(other.store.list("locks/")) == ["locks/a"]
    pair.below.put_new("plain/a", [b"."])
    assert pair.store.strangers() == []
    assert list(pair.store.list("")) == ["locks/a"]


def test_a_damaged_piece_of_an_index_costs_space_only() -> None:
    """Seen to fail a backup: other than without encryption, reading a part may be an error."""
    secret = Secret(b"ab" * 32)
    made = MemoryStore()
    frames = [number.to_bytes(4, "little") * 30 for number in range(6000)]
    assert stored_of(Repository.create(made, secret), frames) == len(frames)
    (name,) = made.list("index/")
    data = made.get(name)
    places = range(SALT_BYTES, len(data), STORED_PIECE)
    assert len(places) >= 4
    lost = []
    for place in places:
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        store = MemoryStore()
        for other in made.list(""):
            store.put_new(other, [damaged if other == name else made.get(other)])
        lost.append(stored_of(Repository.open(store, secret), frames))
    # What is in the first piece is needed for all.
    assert lost[0] == len(frames)
    assert all(0 < count <= len(frames) for count in lost)


def stored_of(repository: Repository, frames: list[bytes]) -> int:
    """How many of `frames` are not found in the repository, and stored."""
    writer = repository.writer(1)
    try:
        for raw in frames:
            writer.store_frame(raw)
        writer.flush()
    finally:
        writer.close()
    return writer.counts.frames_stored
