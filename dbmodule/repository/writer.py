"""Writing frames: deduplicate, compress, collect into packs, upload in the background.

Order of durability: packs first, then an index segment over them, and only then may a manifest
refer to them. A crash leaves packs and segments that no manifest needs; the next backup finds
their frames in the index, so interrupted work is not lost.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import zstandard

from dbmodule.delta import FRAME_PAGES, REF, Refs
from dbmodule.errors import (
    CorruptObjectError,
    ObjectExistsError,
    ObjectMissingError,
    RepositoryError,
)
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import Buffer, ObjectStore
from dbmodule.registry import HASH_BYTES
from dbmodule.repository import index
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.index import Hit, PackRef
from dbmodule.repository.lookup import ContentIndex
from dbmodule.repository.pack import (
    ENCODING_RAW,
    ENCODING_ZSTD,
    MAX_FRAMES,
    Footer,
    PackBuilder,
    PackId,
    keyed,
    name_of,
    page_slices,
)

Ref = tuple[int, int, int]
"""Pack (row of this backup's pack table), frame, slot."""
_KIND = {True: b"f", False: b"p"}
"""What tells a frame's hash from a page's among those that are remembered."""


@dataclass(slots=True)
class WriteCounts:
    frames_stored: int = 0
    pages_stored: int = 0
    bytes_compressed: int = 0
    """Of all frames so far, durable or not."""
    bytes_stored: int = 0
    """Of all objects that are durable."""


def _refs_of(frame: Ref, count: int) -> Refs:
    """References to the first `count` slots of a frame."""
    refs = np.empty(count, REF)
    refs["pack"], refs["frame"], refs["slot"] = frame[0], frame[1], np.arange(count)
    return refs


class FrameWriter:
    """The storage engine's intake for one backup. `store_*` may be called from many threads."""

    PACK_BYTES = 32 << 20
    UPLOADS = 2
    INDEX_ENTRIES = 1 << 18
    """A segment is written whenever this many new entries have become durable,"""
    INDEX_PACKS = 2
    """or so many packs, and a twentieth of all so far: but for such a part the next run finds what
    a killed one has stored, and however long a run is it makes few segments."""
    RECENT = 1 << 17
    """Bound on the frames and pages of this very backup that are remembered for deduplication."""
    GONE = 1 << 16
    """Bound on the packs that are remembered as missing though the index knows of them."""

    def __init__(
        self,
        store: ObjectStore,
        key: bytes,
        reader: FrameReader,
        level: int,
        avoid: Collection[PackId] = (),
        condemned: Callable[[], Collection[PackId]] = tuple,
    ) -> None:
        """Packs to `avoid` are not found again; none in `condemned`, which is asked at the end,
        may be referred to.
        """
        self._store = store
        self._avoid = avoid
        self._condemned = condemned
        self._key = key
        self._reader = reader
        self._level = level
        self._index = ContentIndex(store, key)
        self._lock = threading.Lock()
        self._local = threading.local()
        self._builder = PackBuilder()
        self._ordinal: int | None = None
        self._packs: list[PackRef | None] = []
        self._ordinals: dict[str, int] = {}
        # Two generations: when the new one is full it becomes the old one.
        self._recent: dict[bytes, Ref] = {}
        self._less_recent: dict[bytes, Ref] = {}
        self._gone: set[str] = set()
        self._uploads = ThreadPoolExecutor(self.UPLOADS, thread_name_prefix="upload")
        self._slots = threading.BoundedSemaphore(self.UPLOADS + 1)
        self._pending: list[Future[Footer]] = []
        self._unindexed: list[Footer] = []
        self._stored = 0
        self.counts = WriteCounts()

    # -- intake ---------------------------------------------------------------------------------

    def store_frame(self, raw: Buffer, pages: int = 0) -> tuple[int, int]:
        """Store up to 256 kB as one frame, unless it is there; gives (pack, frame).

        `pages` is how many pages of the data directory that is, for the counts.
        """
        digest = keyed(self._key, raw)
        known = self._find([digest[:HASH_BYTES]], whole=True)[0]
        if known is None:
            known = self._append(raw, digest, b"", pages)
        return known[0], known[1]

    def store_run(self, pages: Buffer) -> Refs:
        """Store up to 32 pages that belong together, found again only as a whole."""
        count = -(-len(pages) // PAGE_SIZE)
        pack, frame = self.store_frame(pages, count)
        return _refs_of((pack, frame, 0), count)

    def find_runs(self, runs: Sequence[Buffer]) -> list[tuple[bytes, Refs | None]]:
        """The hash of each of some runs of pages, and its references if it is there already."""
        digests = [keyed(self._key, run) for run in runs]
        known = self._find([digest[:HASH_BYTES] for digest in digests], whole=True)
        return [
            (digest, None if ref is None else _refs_of(ref, len(run) // PAGE_SIZE))
            for run, digest, ref in zip(runs, digests, known, strict=True)
        ]

    def add_run(self, run: Buffer, digest: bytes) -> Refs:
        """Store a run of pages that `find_runs` did not find, and whose hash it gave."""
        count = len(run) // PAGE_SIZE
        with self._lock:
            known = self._recent.get(digest[:HASH_BYTES] + _KIND[True])
        return _refs_of(known or self._append(run, digest, b"", count), count)

    def store_shared(self, runs: Sequence[Buffer]) -> list[Refs]:
        """Store runs of up to 32 pages that may be found again one by one, too."""
        whole = [keyed(self._key, run, HASH_BYTES) for run in runs]
        return [
            self.store_pages(run, self.hashes(run))
            if ref is None
            else _refs_of(ref, len(run) // PAGE_SIZE)
            for run, ref in zip(runs, self._find(whole, whole=True), strict=True)
        ]

    def digest(self, raw: Buffer) -> bytes:
        """The hash, 32 bytes, that a frame of these bytes has."""
        return keyed(self._key, raw)

    def hashes(self, pages: Buffer) -> list[bytes]:
        """The 16-byte hash of each 8 kB chunk; the last chunk may be shorter."""
        view = memoryview(pages).cast("B")
        return [keyed(self._key, view[part], HASH_BYTES) for part in page_slices(len(view))]

    def store_pages(self, pages: Buffer, hashes: Sequence[bytes]) -> Refs:
        """Store each of these chunks unless it is there already; one reference per chunk.

        Chunks that are new are gathered into frames of up to 32; only the last may be shorter
        than 8 kB.
        """
        view = memoryview(pages).cast("B")
        parts = page_slices(len(view))
        refs = np.empty(len(parts), REF)
        new: list[int] = []
        first: dict[bytes, int] = {}
        again: list[int] = []
        for number, known in enumerate(self._find(hashes, whole=False)):
            if known is not None:
                refs[number] = known
            elif first.setdefault(hashes[number], number) == number:
                new.append(number)
            else:
                again.append(number)
        for start in range(0, len(new), FRAME_PAGES):
            batch = new[start : start + FRAME_PAGES]
            if batch[-1] - batch[0] == len(batch) - 1:
                raw: Buffer = view[parts[batch[0]].start : parts[batch[-1]].stop]
            else:
                raw = b"".join([view[parts[number]] for number in batch])
            joined = b"".join([hashes[number] for number in batch])
            pack, frame, _ = self._append(raw, keyed(self._key, raw), joined, len(batch))
            for slot, number in enumerate(batch):
                refs[number] = (pack, frame, slot)
        for number in again:
            refs[number] = refs[first[hashes[number]]]
        return refs

    # -- deduplication --------------------------------------------------------------------------

    def _find(self, hashes: Sequence[bytes], *, whole: bool) -> list[Ref | None]:
        """Where frames (`whole`) or pages with these 16-byte hashes are, as far as is known."""
        kind = _KIND[whole]
        found: list[Ref | None] = []
        with self._lock:
            for digest in hashes:
                recent = self._recent.get(digest + kind)
                found.append(recent or self._less_recent.get(digest + kind))
        missing = [number for number, ref in enumerate(found) if ref is None]
        hits = self._index.find_many([hashes[number] for number in missing], whole=whole)
        for number, hit in zip(missing, hits, strict=True):
            if hit is not None:
                found[number] = self._confirmed(hit, hashes[number], whole=whole)
        return found

    def _confirmed(self, hit: Hit, digest: bytes, *, whole: bool) -> Ref | None:
        """What the index says, if the pack's own footer says so too."""
        if hit.pack.pack in self._gone or hit.pack.pack in self._avoid:
            return None
        try:
            footer = self._reader.footer(hit.pack)
        except ObjectMissingError:
            # A stale index: what it promises is not there, so the page is stored.
            if len(self._gone) < self.GONE:
                self._gone.add(hit.pack.pack)
            return None
        except CorruptObjectError:
            return None
        if hit.frame >= len(footer.entries):
            return None
        if whole:
            confirmed: bytes | None = footer.frame_hash(hit.frame)[:HASH_BYTES]
        else:
            confirmed = footer.page_hash(hit.frame, hit.slot)
        if confirmed != digest:
            return None
        # Not the index's own words: its sizes may be wrong, and a footer that was at hand already
        # was not found by them.
        ordinal = self.refer(PackRef(footer.pack, footer.object_size, footer.length))
        return ordinal, hit.frame, 0 if whole else hit.slot

    def avoids(self, packs: Iterable[PackRef]) -> bool:
        """May any of these packs be about to go, so that nothing new may refer to it?"""
        return any(pack.pack in self._avoid for pack in packs)

    def refer(self, pack: PackRef) -> int:
        """The row in this backup's pack table of a pack that an earlier one wrote."""
        with self._lock:
            ordinal = self._ordinals.get(pack.pack)
            if ordinal is None:
                ordinal = self._ordinals[pack.pack] = len(self._packs)
                self._packs.append(pack)
        return ordinal

    # -- packs ----------------------------------------------------------------------------------

    def _compress(self, raw: Buffer) -> tuple[Buffer, int]:
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=self._level)
        packed = compressor.compress(raw)
        if len(packed) < len(raw):
            # A copy: the compressor's own bytes keep all the memory that the worst case takes.
            return bytes(memoryview(packed)), ENCODING_ZSTD
        return bytes(raw), ENCODING_RAW

    def _append(self, raw: Buffer, digest: bytes, hashes: bytes, pages: int) -> Ref:
        stored, encoding = self._compress(raw)
        full: tuple[int, PackBuilder] | None = None
        with self._lock:
            if self._ordinal is None:
                self._ordinal = len(self._packs)
                self._packs.append(None)
            ordinal = self._ordinal
            frame = self._builder.add(stored, len(raw), encoding, digest, hashes)
            self.counts.frames_stored += 1
            self.counts.pages_stored += pages
            self.counts.bytes_compressed += len(stored)
            self._remember(digest[:HASH_BYTES] + _KIND[True], (ordinal, frame, 0))
            for slot in range(len(hashes) // HASH_BYTES):
                page = hashes[slot * HASH_BYTES : (slot + 1) * HASH_BYTES]
                self._remember(page + _KIND[False], (ordinal, frame, slot))
            if self._builder.size >= self.PACK_BYTES or len(self._builder) >= MAX_FRAMES:
                full = ordinal, self._take_builder()
        if full is not None:
            self._upload(*full)
        return ordinal, frame, 0

    def _remember(self, key: bytes, ref: Ref) -> None:
        self._recent[key] = ref
        if len(self._recent) >= self.RECENT // 2:
            self._recent, self._less_recent = {}, self._recent

    def _take_builder(self) -> PackBuilder:
        builder, self._builder, self._ordinal = self._builder, PackBuilder(), None
        return builder

    def _upload(self, ordinal: int, builder: PackBuilder) -> None:
        # The semaphore bounds the packs in memory: whoever fills one while others are still on
        # their way waits here.
        self._slots.acquire()
        try:
            self._raise_failed()
            future = self._uploads.submit(self._put, ordinal, builder)
        except BaseException:
            self._slots.release()
            raise
        with self._lock:
            self._pending.append(future)

    def _put(self, ordinal: int, builder: PackBuilder) -> Footer:
        try:
            chunks, footer = builder.seal(self._key)
            self._store.put_new(name_of(footer.pack), chunks)
            with self._lock:
                self._packs[ordinal] = PackRef(footer.pack, footer.object_size, footer.length)
                self._unindexed.append(footer)
                self._stored += 1
                self.counts.bytes_stored += footer.object_size
            return footer
        finally:
            self._slots.release()

    def _raise_failed(self) -> None:
        with self._lock:
            done = [future for future in self._pending if future.done()]
            self._pending = [future for future in self._pending if not future.done()]
        for future in done:
            future.result()
        with self._lock:
            entries = sum(len(f.entries) + len(f.page_hashes) for f in self._unindexed)
            packs = len(self._unindexed)
            due = packs >= max(self.INDEX_PACKS, self._stored // 20)
        if due or entries >= self.INDEX_ENTRIES:
            self._write_index()

    def _write_index(self) -> None:
        with self._lock:
            footers, self._unindexed = self._unindexed, []
        if not footers:
            return
        for name, chunks in index.encode(footers, self._key):
            with contextlib.suppress(ObjectExistsError):
                size = self._store.put_new(name, chunks)
                with self._lock:
                    self.counts.bytes_stored += size

    def flush(self) -> list[PackRef]:
        """Make everything durable and give the pack table: references' first member is its row."""
        with self._lock:
            last = None if self._ordinal is None else (self._ordinal, self._take_builder())
        if last is not None:
            self._upload(*last)
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.result()
        self._write_index()
        with self._lock:
            packs = [pack for pack in self._packs if pack is not None]
            if len(packs) != len(self._packs):
                raise RepositoryError("a pack was not stored")  # pragma: no cover
        return packs

    def store_root(self, raw: bytes) -> PackRef:
        """Store the root frame in a pack of its own: it lists all others, so it comes last."""
        builder = PackBuilder()
        stored, encoding = self._compress(raw)
        builder.add(stored, len(raw), encoding, keyed(self._key, raw), b"")
        chunks, footer = builder.seal(self._key)
        self.counts.bytes_stored += self._store.put_new(name_of(footer.pack), chunks)
        return PackRef(footer.pack, footer.object_size, footer.length)

    def check_references(self) -> None:
        """Are the packs that earlier backups wrote and this one refers to still there, whole, and
        none of them condemned?

        Raises `RepositoryError`; to be asked after `flush` and before the manifest is written.
        """
        condemned = self._condemned()
        for pack in self._packs:
            if pack is not None and pack.pack in condemned:
                raise RepositoryError(
                    f"{name_of(pack.pack)} was condemned by an expiry while this run referred to"
                    " it",
                    hint="Run the backup again; if that happens twice, report it.",
                )
            if pack is not None and pack.pack in self._ordinals:
                name = name_of(pack.pack)
                try:
                    size = self._store.size(name)
                except ObjectMissingError:
                    if self._reader.husk(pack.pack) is None:
                        raise
                    continue
                if size != pack.size:
                    raise RepositoryError(
                        f"{name} does not have the size that it was written with",
                        hint="Run `dbmodule verify`; a full backup into a new repository is safe.",
                    )

    def close(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)
