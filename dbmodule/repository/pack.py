"""Packs: append-only objects of frames, named by the hash of their own table of contents.

    pack    = header, frame bytes ..., footer, trailer
    header  = magic "DBMPACK1", format u32, zero u32, 16 random bytes                (32 bytes)
    footer  = frames u32, page hashes u32, body length u64, body hash 32,
              one 44-byte entry per frame, one 16-byte hash per hashed page
    trailer = footer length u32, format u32, magic "DBMPKEND"                         (16 bytes)

Invariant: a pack's name is the keyed BLAKE3 of its footer, the footer holds the hash of every
frame's raw bytes and of the whole stored body. So whoever knows the name can check every byte,
and a manifest that names its packs is tamper-evident down to the pages. The random bytes of the
header make each name one of its own: a pack that was removed never comes back, so that the late
removal of a pack by a run that was stopped cannot hit another.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from typing import Any, NewType

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, FormatVersionError
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import Buffer
from dbmodule.registry import HASH, HASH_BYTES
from dbmodule.repository.document import FORMAT

PackId = NewType("PackId", str)
"""64 hexadecimal digits."""

MAGIC = b"DBMPACK1"
END_MAGIC = b"DBMPKEND"
PREFIX = "packs/"
HEADER = struct.Struct("<8sII16s")
FOOTER = struct.Struct("<IIQ32s")
TRAILER = struct.Struct("<II8s")
ENTRY = np.dtype(
    [
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("encoding", "u1"),
        ("hashed_pages", "u1"),
        ("zero", "<u2"),
        ("hash", "V32"),
    ]
)
ENCODING_RAW = 0
ENCODING_ZSTD = 1
MAX_FRAMES = 1 << 24
"""Frame numbers fit into 24 bits (the index packs them with a slot)."""


def name_of(pack: PackId) -> str:
    """The pack's object name; two digits of fan-out keep directories small."""
    return f"{PREFIX}{pack[:2]}/{pack}"


def keyed(key: bytes, data: Buffer, length: int = 32) -> bytes:
    """Keyed BLAKE3, `length` bytes."""
    return blake3(data, key=key).digest(length)


class PackBuilder:
    """Collects frames in memory until they are sealed into the chunks of one object."""

    def __init__(self) -> None:
        # Two packs of the same frames must not have one name: see the invariant above.
        self._chunks: list[Buffer] = [HEADER.pack(MAGIC, FORMAT, 0, secrets.token_bytes(16))]
        self._entries: list[tuple[int, int, int, int, int, bytes]] = []
        self._page_hashes: list[bytes] = []
        self.size = HEADER.size

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, stored: Buffer, raw: int, encoding: int, digest: bytes, hashes: bytes) -> int:
        """Append a frame and give its number. `hashes` is 16 bytes per page, or empty."""
        self._chunks.append(stored)
        self.size += len(stored)
        pages = len(hashes) // HASH_BYTES
        self._entries.append((len(stored), raw, encoding, pages, 0, digest))
        if pages:
            self._page_hashes.append(hashes)
        return len(self._entries) - 1

    def seal(self, key: bytes) -> tuple[list[Buffer], Footer]:
        """The object's bytes in order, and its table of contents."""
        body = blake3(key=key)
        for chunk in self._chunks:
            body.update(chunk)
        hashes = b"".join(self._page_hashes)
        footer = b"".join(
            (
                FOOTER.pack(
                    len(self._entries), len(hashes) // HASH_BYTES, self.size, body.digest()
                ),
                np.array(self._entries, ENTRY).tobytes(),
                hashes,
            )
        )
        trailer = TRAILER.pack(len(footer), FORMAT, END_MAGIC)
        pack = PackId(keyed(key, footer).hex())
        return [*self._chunks, footer, trailer], Footer.parse(pack, footer)


@dataclass(frozen=True, slots=True)
class Footer:
    """A pack's table of contents."""

    pack: PackId
    length: int
    """Bytes of the footer itself."""
    body_length: int
    body_hash: bytes
    entries: NDArray[Any]
    """Shape (frames,), dtype `ENTRY`."""
    offsets: NDArray[np.int64]
    """Where each frame starts in the object; shape (frames,)."""
    page_hashes: NDArray[Any]
    """Shape (hashed pages,), dtype V16, in the order of frames and slots."""
    first_hash: NDArray[np.int64]
    """Position of each frame's first page hash; shape (frames,)."""

    @property
    def object_size(self) -> int:
        return self.body_length + self.length + TRAILER.size

    @classmethod
    def parse(cls, pack: PackId, data: bytes) -> Footer:
        """Read the footer of `pack`, whose hash was checked.

        Raises `CorruptObjectError` when its parts do not add up.
        """
        if len(data) < FOOTER.size:
            raise CorruptObjectError("a pack's footer is too short")
        frames, hashes, body_length, body_hash = FOOTER.unpack_from(data)
        if len(data) != FOOTER.size + frames * ENTRY.itemsize + hashes * HASH_BYTES:
            raise CorruptObjectError("a pack's footer does not have the length that it states")
        entries = np.frombuffer(data, ENTRY, frames, FOOTER.size)
        page_hashes = np.frombuffer(data, HASH, hashes, FOOTER.size + frames * ENTRY.itemsize)
        ends = HEADER.size + np.cumsum(entries["stored"], dtype=np.int64)
        counts = entries["hashed_pages"].astype(np.int64)
        if (int(ends[-1]) if frames else HEADER.size) != body_length or counts.sum() != hashes:
            raise CorruptObjectError("a pack's frames do not fill its body")
        return cls(
            pack,
            len(data),
            body_length,
            body_hash,
            entries,
            ends - entries["stored"],
            page_hashes,
            np.cumsum(counts) - counts,
        )

    @classmethod
    def open(cls, pack: PackId, data: bytes, key: bytes) -> Footer:
        """Read the footer of `pack`; raises `CorruptObjectError` unless its hash is that name."""
        if keyed(key, data).hex() != pack:
            raise CorruptObjectError(
                f"{name_of(pack)}: its table of contents does not match its name",
                hint="Run `dbmodule verify` to see which backups are affected.",
            )
        return cls.parse(pack, data)

    def frame_hash(self, frame: int) -> bytes:
        return bytes(self.entries["hash"][frame])

    def page_hash(self, frame: int, slot: int) -> bytes | None:
        """The hash of one page of a frame, where the frame has hashes per page."""
        if slot >= int(self.entries["hashed_pages"][frame]):
            return None
        return bytes(self.page_hashes[int(self.first_hash[frame]) + slot])


def open_whole(name: str, data: memoryview, key: bytes) -> Footer:
    """The footer of a pack that was read whole, after every stored byte was checked.

    Raises `CorruptObjectError` or `FormatVersionError`.
    """
    length = footer_length(name, bytes(data[-TRAILER.size :]))
    start = len(data) - TRAILER.size - length
    head = HEADER.pack(MAGIC, FORMAT, 0, bytes(16))[:-16]
    if start < HEADER.size or bytes(data[: len(head)]) != head:
        raise CorruptObjectError(f"{name}: not a pack, or damaged at its beginning")
    identity = PackId(name.rpartition("/")[2])
    if name != name_of(identity):
        raise CorruptObjectError(f"{name}: is not where a pack of that name belongs")
    footer = Footer.open(identity, bytes(data[start : start + length]), key)
    if footer.body_length != start or keyed(key, data[:start]) != footer.body_hash:
        raise CorruptObjectError(f"{name}: its bytes do not match their hash")
    return footer


def footer_length(name: str, trailer: bytes) -> int:
    """The footer's length from an object's last 16 bytes."""
    if len(trailer) != TRAILER.size:
        raise CorruptObjectError(f"{name}: too short to be a pack")
    length, version, magic = TRAILER.unpack(trailer)
    if magic != END_MAGIC:
        raise CorruptObjectError(f"{name}: not a pack, or cut off")
    if version != FORMAT:
        raise FormatVersionError(f"{name}: pack format {version} is not known")
    return int(length)


def page_slices(length: int) -> list[slice]:
    """The slices of 8 kB chunks in `length` bytes; the last may be shorter."""
    return [slice(start, min(start + PAGE_SIZE, length)) for start in range(0, length, PAGE_SIZE)]
