"""Compaction: the live frames of packs that are mostly dead, copied together into new ones.

Frames are copied as they are stored, each after its bytes were checked. A pack gets its husk only
when all of them are durable in their new places; then it can go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dbmodule.errors import CorruptObjectError, ObjectExistsError, ObjectMissingError
from dbmodule.repository import index
from dbmodule.repository.husk import Moved, write_husk
from dbmodule.repository.index import PackRef
from dbmodule.repository.pack import HEADER, TRAILER, Footer, PackBuilder, PackId, name_of
from dbmodule.repository.repository import Repository
from dbmodule.repository.usage import Usage
from dbmodule.repository.writer import FrameWriter

_SMALLEST_FOOTER = 48
_SMALLEST_ENTRY = 44
_READ = 8 << 20
_GAP = 256 << 10


def mostly_dead(
    repository: Repository, usage: Usage, live_share: float, leave: Collection[PackId]
) -> list[PackRef]:
    """Packs of whose stored bytes less than `live_share` is in use, but for those to `leave`.

    `usage` must know every frame. A pack that cannot be read is left as it is.
    """
    found = []
    for pack, ref in sorted(usage.needed.items()):
        frames = usage.frames[pack]
        # No pack has more frames than this, so most that are mostly alive need not be looked at.
        most = (ref.footer - _SMALLEST_FOOTER) // _SMALLEST_ENTRY
        if pack in leave or pack in usage.husks or len(frames) >= live_share * most:
            continue
        with suppress(CorruptObjectError, ObjectMissingError):
            footer = repository.frames.footer(ref)
            if len(frames) and int(frames[-1]) >= len(footer.entries):
                continue
            live = int(footer.entries["stored"][frames].sum())
            if live < live_share * (footer.body_length - HEADER.size):
                found.append(ref)
    return found


@dataclass(slots=True)
class _Copying:
    """A new pack while frames are added to it."""

    builder: PackBuilder = field(default_factory=PackBuilder)
    frames: list[tuple[int, int, int]] = field(default_factory=list)
    """Old pack, old and new number of each frame."""


def rewrite(
    repository: Repository,
    usage: Usage,
    packs: Sequence[PackRef],
    *,
    before_write: Callable[[], None],
    progress: Callable[[int, int], None],
) -> int:
    """Copy the live frames of `packs`, and give each pack its husk; gives the bytes written.

    A pack with a damaged frame gets none, so that it stays.
    """
    moves: list[list[Moved]] = [[] for _ in packs]
    footers: list[Footer] = []
    damaged: set[int] = set()
    copying = _Copying()

    def seal() -> None:
        nonlocal copying
        if not len(copying.builder):
            return
        chunks, footer = copying.builder.seal(repository.key)
        before_write()
        repository.store.put_new(name_of(footer.pack), chunks)
        footers.append(footer)
        ref = PackRef(footer.pack, footer.object_size, footer.length)
        for old, first, target in copying.frames:
            _extend(moves[old], first, ref, target)
        copying = _Copying()

    for number, ref in enumerate(packs):
        footer = repository.frames.footer(ref)
        live = usage.frames[ref.pack].tolist()
        try:
            for frame, stored in repository.frames.stored_frames(ref, live, _READ, _GAP):
                # A copy: else a few frames would keep all that was read in memory.
                target = _add(copying.builder, footer, frame, bytes(stored))
                copying.frames.append((number, frame, target))
                if copying.builder.size >= FrameWriter.PACK_BYTES:
                    seal()
        except (CorruptObjectError, ObjectMissingError):
            damaged.add(number)
        progress(number + 1, len(packs))
    seal()
    written = sum(footer.object_size for footer in footers)
    if footers:
        for name, chunks in index.encode(footers, repository.key):
            before_write()
            with suppress(ObjectExistsError):
                written += repository.store.put_new(name, chunks)
    for number, ref in enumerate(packs):
        if number not in damaged:
            start = ref.size - TRAILER.size - ref.footer
            data = repository.store.get(name_of(ref.pack), start, ref.footer)
            before_write()
            write_husk(repository.documents, ref.pack, data, moves[number])
    return written


def _add(builder: PackBuilder, footer: Footer, frame: int, stored: bytes) -> int:
    entry = footer.entries[frame]
    first = int(footer.first_hash[frame])
    hashes = footer.page_hashes[first : first + int(entry["hashed_pages"])].tobytes()
    return builder.add(
        stored, int(entry["raw"]), int(entry["encoding"]), footer.frame_hash(frame), hashes
    )


def _extend(moves: list[Moved], first: int, pack: PackRef, target: int) -> None:
    """Add a frame, joined with those before it where it follows on them."""
    if moves:
        last = moves[-1]
        follows = (last.first + last.count, last.target + last.count)
        if last.pack == pack and follows == (first, target):
            moves[-1] = Moved(last.first, last.count + 1, pack, last.target)
            return
    moves.append(Moved(first, 1, pack, target))
