"""Reading frames: footers and frame bytes, each checked against the hash it was stored under."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from dbmodule.errors import CorruptObjectError, ObjectMissingError
from dbmodule.ports import ObjectStore
from dbmodule.repository.document import Documents
from dbmodule.repository.husk import Husk, read_husk
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import (
    ENCODING_RAW,
    ENCODING_ZSTD,
    FOOTER,
    HEADER,
    TRAILER,
    Footer,
    PackId,
    keyed,
    name_of,
)

_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    # A zstd context may serve one thread at a time, and is worth keeping.
    found: zstandard.ZstdDecompressor | None = getattr(_thread, "decompressor", None)
    if found is None:
        found = _thread.decompressor = zstandard.ZstdDecompressor()
    return found


class FrameReader:
    """Frames of a repository's packs. Safe for threads; keeps footers up to a number of bytes.

    A pack that is not there is looked for by its husk, which says where its frames are now.
    """

    FOOTER_BYTES = 32 << 20
    HUSKS = 64

    def __init__(self, store: ObjectStore, key: bytes) -> None:
        self._store = store
        self._key = key
        self._documents = Documents(store, key)
        self._footers: OrderedDict[str, Footer] = OrderedDict()
        self._footer_bytes = 0
        self._husks: OrderedDict[str, Husk] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def footer(self, ref: PackRef) -> Footer:
        """The authenticated table of contents; `CorruptObjectError`, `ObjectMissingError`."""
        with self._lock:
            found = self._footers.get(ref.pack)
            if found is not None:
                self._footers.move_to_end(ref.pack)
                return found
        name = name_of(ref.pack)
        start = ref.size - TRAILER.size - ref.footer
        if start < HEADER.size or ref.footer < FOOTER.size:
            raise CorruptObjectError(f"{name}: is referred to with an impossible size")
        try:
            data = self._store.get(name, start, ref.footer)
            footer = Footer.open(ref.pack, data, self._key)
        except ObjectMissingError as error:
            footer = self._moved_to(ref, error).footer
        if footer.object_size != ref.size:
            raise CorruptObjectError(f"{name}: is referred to with the wrong size")
        with self._lock:
            if ref.pack not in self._footers:
                self._footers[ref.pack] = footer
                self._footer_bytes += footer.length
            while self._footer_bytes > self.FOOTER_BYTES and len(self._footers) > 1:
                self._footer_bytes -= self._footers.popitem(last=False)[1].length
        return footer

    def husk(self, pack: PackId) -> Husk | None:
        """None when the pack has none; `CorruptObjectError`."""
        with self._lock:
            found = self._husks.get(pack)
            if found is not None:
                self._husks.move_to_end(pack)
                return found
        husk = read_husk(self._documents, pack, self._key)
        if husk is not None:
            with self._lock:
                self._husks[pack] = husk
                while len(self._husks) > self.HUSKS:
                    self._husks.popitem(last=False)
        return husk

    def _moved_to(self, ref: PackRef, error: ObjectMissingError) -> Husk:
        """Where the frames of a pack are now that is not there; raises `error` if nowhere."""
        husk = self.husk(ref.pack)
        if husk is None:
            raise error
        return husk

    def frame(self, ref: PackRef, number: int) -> bytes:
        """The raw bytes of one frame."""
        ((_, raw),) = self._read(ref, [number], 0, 0)
        return raw

    def frames(
        self, ref: PackRef, numbers: Sequence[int], read_bytes: int, gap_bytes: int
    ) -> Iterator[tuple[int, bytes]]:
        """The raw bytes of ascending frame `numbers`; neighbours are fetched in one read.

        Reads join frames that are at most `gap_bytes` apart, up to about `read_bytes`.
        """
        if len(numbers) == 1:
            # Files that share a frame come one after the other.
            held: tuple[str, int, bytes] | None = getattr(self._local, "frame", None)
            if held is None or held[:2] != (ref.pack, numbers[0]):
                held = ref.pack, numbers[0], self.frame(ref, numbers[0])
                self._local.frame = held
            yield numbers[0], held[2]
        else:
            yield from self._read(ref, numbers, read_bytes, gap_bytes)

    def _read(
        self, ref: PackRef, numbers: Sequence[int], read_bytes: int, gap_bytes: int
    ) -> Iterator[tuple[int, bytes]]:
        footer = self.footer(ref)
        done = 0
        try:
            for number, stored in self._stored(ref, footer, numbers, read_bytes, gap_bytes):
                yield number, self.decode(footer, number, stored)
                done += 1
        except ObjectMissingError as error:
            husk = self._moved_to(ref, error)
            rest = np.array(numbers[done:], np.int64)
            yield from self._moved(footer, husk, rest, read_bytes, gap_bytes)

    def stored_frames(
        self, ref: PackRef, numbers: Sequence[int], read_bytes: int, gap_bytes: int
    ) -> Iterator[tuple[int, memoryview]]:
        """As `frames`, but as they are stored, after they were checked, and from this pack only."""
        footer = self.footer(ref)
        for number, stored in self._stored(ref, footer, numbers, read_bytes, gap_bytes):
            self.decode(footer, number, stored)
            yield number, stored

    def _stored(
        self,
        ref: PackRef,
        footer: Footer,
        numbers: Sequence[int],
        read_bytes: int,
        gap_bytes: int,
    ) -> Iterator[tuple[int, memoryview]]:
        name = name_of(ref.pack)
        if numbers and not 0 <= numbers[0] <= numbers[-1] < len(footer.entries):
            raise CorruptObjectError(f"{name}: has no frame {numbers[-1]}")
        starts = footer.offsets[numbers].tolist()
        ends = (footer.offsets[numbers] + footer.entries["stored"][numbers]).tolist()
        first = 0
        while first < len(numbers):
            last = first
            while (
                last + 1 < len(numbers)
                and starts[last + 1] - ends[last] <= gap_bytes
                and ends[last + 1] - starts[first] <= read_bytes
            ):
                last += 1
            data = memoryview(self._store.get(name, starts[first], ends[last] - starts[first]))
            for at in range(first, last + 1):
                offset = starts[at] - starts[first]
                yield numbers[at], data[offset : offset + ends[at] - starts[at]]
            first = last + 1

    def _moved(
        self,
        footer: Footer,
        husk: Husk,
        numbers: NDArray[np.int64],
        read_bytes: int,
        gap_bytes: int,
    ) -> Iterator[tuple[int, bytes]]:
        """As `frames`, of a pack whose frames are in others now."""
        if husk.lacks(numbers):
            raise CorruptObjectError(f"{name_of(footer.pack)}: a frame was removed that is in use")
        rows, targets = husk.numbers[numbers], husk.targets[numbers]
        # Stretches that lie in one pack, in its order.
        cuts = np.flatnonzero((np.diff(rows) != 0) | (np.diff(targets) <= 0)) + 1
        for part in np.split(np.arange(len(numbers)), cuts):
            place = husk.packs[int(rows[part[0]])]
            there = self.footer(place)
            found = self.frames(place, targets[part].tolist(), read_bytes, gap_bytes)
            for old, (new, raw) in zip(numbers[part].tolist(), found, strict=True):
                if there.frame_hash(new) != footer.frame_hash(old):
                    raise CorruptObjectError(
                        f"{name_of(footer.pack)}: its husk takes another frame for frame {old}"
                    )
                yield old, raw

    def decode(self, footer: Footer, number: int, stored: bytes | memoryview) -> bytes:
        """Decompress frame `number` from its stored bytes and check its hash."""
        entry = footer.entries[number]
        length, encoding = int(entry["raw"]), int(entry["encoding"])
        try:
            if encoding == ENCODING_RAW:
                raw = bytes(stored)
            elif encoding == ENCODING_ZSTD:
                if zstandard.frame_content_size(stored) != length:
                    # Its memory would be taken before anything else could be checked.
                    raise CorruptObjectError(
                        f"{name_of(footer.pack)}: frame {number} states another size than its"
                        " pack does"
                    )
                raw = _decompressor().decompress(stored, max_output_size=length)
            else:
                raise CorruptObjectError(
                    f"{name_of(footer.pack)}: frame {number} has unknown encoding {encoding}"
                )
        except zstandard.ZstdError as error:
            raise CorruptObjectError(
                f"{name_of(footer.pack)}: frame {number} cannot be decompressed: {error}"
            ) from error
        if len(raw) != length or keyed(self._key, raw) != footer.frame_hash(number):
            raise CorruptObjectError(
                f"{name_of(footer.pack)}: the bytes of frame {number} do not match their hash",
                hint="Run `dbmodule verify` to see which backups are affected.",
            )
        return raw
