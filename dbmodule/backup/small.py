"""Small files of relations that no baseline knows, read and looked at many at a time.

A database may have hundreds of thousands of them, and then what each costs beside its bytes is
what counts. So many files are read into one buffer, their pages are looked at with one call, and
they share frames, each page hashed by itself: a frame is found again as a whole as long as none of
its files changed, and else page by page. A frame ends before certain paths, chosen by their names,
so that frames further on stay the same when a file appears or goes.

Whatever is out of the ordinary (a page that fails its checksum or has no proper header, a file that
is cut meanwhile) is left to the way in which single files are copied.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dbmodule import datafile, detect, page
from dbmodule.backup.values import CopyResult, CopySettings
from dbmodule.delta import FRAME_PAGES, Refs, to_extents, zero_refs
from dbmodule.ident import PAGE_SIZE
from dbmodule.ports import DataDirectory
from dbmodule.registry import HASH, EntryKind, FileIdentity, settled
from dbmodule.repository.writer import FrameWriter

SMALL_BYTES = (FRAME_PAGES - 1) * PAGE_SIZE
_CUT_EVERY = 4
"""A frame ends before one of so many paths."""


@dataclass(slots=True)
class _Read:
    """A file that lies in the buffer, whole."""

    path: str
    relation: datafile.RelationFile
    mode: int
    identity: FileIdentity
    start: int
    """Its first page in the buffer."""
    pages: int


def copy_together(
    paths: Sequence[str],
    directory: DataDirectory,
    frames: FrameWriter,
    settings: CopySettings,
    buffer: memoryview,
) -> dict[str, CopyResult]:
    """Copy files that fit into `buffer` one by one; those that are not in the answer were not."""
    results: dict[str, CopyResult] = {}
    for group in _groups(paths, directory, buffer):
        results.update(_copy(group, frames, settings, buffer))
    return results


def _groups(
    paths: Sequence[str], directory: DataDirectory, buffer: memoryview
) -> Iterator[list[_Read]]:
    """As many files at a time as the buffer holds."""
    room = len(buffer) // PAGE_SIZE
    group: list[_Read] = []
    used = 0
    for path in paths:
        relation = datafile.relation(path)
        file = directory.open(path) if relation is not None else None
        if file is None or relation is None:
            continue
        try:
            identity = file.identity()
            size = identity.size
            pages = size // PAGE_SIZE
            if size > SMALL_BYTES or (relation.fork != "main" and size % PAGE_SIZE):
                continue
            if used + pages > room:
                yield group
                group, used = [], 0
            wanted = pages * PAGE_SIZE
            at = used * PAGE_SIZE
            if wanted and file.read_into(buffer[at : at + wanted], 0) != wanted:
                continue
            group.append(_Read(path, relation, file.mode, identity, used, pages))
            used += pages
        finally:
            file.close()
    if group:
        yield group


def _copy(
    group: list[_Read], frames: FrameWriter, settings: CopySettings, buffer: memoryview
) -> dict[str, CopyResult]:
    """The results of those files of a group in which everything is as it should be."""
    total = group[-1].start + group[-1].pages
    view = buffer[: total * PAGE_SIZE]
    seen = detect.observe(view, settings.wal_segment_size)
    bad = _bad_files(group, seen, settings, view)
    group = [file for number, file in enumerate(group) if number not in bad]
    kept = np.concatenate(
        [np.arange(file.start, file.start + file.pages) for file in group]
        or [np.empty(0, np.int64)]
    ).astype(np.int64)
    refs = zero_refs(total)
    for numbers, stored in _store(group, seen.zero, frames, view):
        refs[numbers] = stored
    blocks = np.concatenate(
        [np.arange(file.pages, dtype=np.uint32) for file in group] or [np.empty(0, np.uint32)]
    )
    # Where one file ends and the next begins block numbers fall: no extent reaches beyond.
    extents = to_extents(blocks, refs[kept])
    first_of = np.append(np.flatnonzero(extents["block"] == 0), len(extents)).tolist()
    results: dict[str, CopyResult] = {}
    number = 0
    for file in group:
        own = slice(first_of[number], first_of[number + 1]) if file.pages else slice(0, 0)
        number += file.pages > 0
        pages = slice(file.start, file.start + file.pages)
        is_main = file.relation.fork == "main"
        results[file.path] = CopyResult(
            file.path,
            EntryKind.RELATION if is_main else EntryKind.CONTENT,
            file.mode,
            file.identity,
            settled(file.identity.mtime_ns, settings.called_ns),
            file.pages * PAGE_SIZE,
            overlay=False,
            extents=extents[own],
            prints=seen.marks[pages] if is_main else _hashes(frames, view, pages),
            blocks=file.pages,
            changed=file.pages,
            verified=file.pages if settings.data_checksums else 0,
            bytes_read=file.pages * PAGE_SIZE,
            bytes_changed=file.pages * PAGE_SIZE,
        )
    return results


def _hashes(frames: FrameWriter, view: memoryview, pages: slice) -> NDArray[np.void]:
    part = view[pages.start * PAGE_SIZE : pages.stop * PAGE_SIZE]
    return np.frombuffer(b"".join(frames.hashes(part)), HASH)


def _bad_files(
    group: list[_Read], seen: detect.Observed, settings: CopySettings, view: memoryview
) -> set[int]:
    """Numbers of the files with a page that is odd or fails its checksum."""
    counts = [file.pages for file in group]
    owner = np.repeat(np.arange(len(group)), counts)
    main = np.array([file.relation.fork == "main" for file in group], np.bool_)
    bad = seen.odd & main[owner]
    if settings.data_checksums and len(owner):
        starts = np.array([file.start for file in group])
        firsts = np.array(
            [file.relation.first_block(settings.blocks_per_segment) for file in group]
        )
        blocks = (np.arange(len(owner)) - starts[owner] + firsts[owner]).astype(np.uint32)
        bad[page.checksum_failures(view, blocks)] = True
    return set(owner[bad].tolist())


def _store(
    group: list[_Read], zero: NDArray[np.bool_], frames: FrameWriter, view: memoryview
) -> Iterator[tuple[NDArray[np.int64], Refs]]:
    """Store all pages but those of zero bytes: numbers in the buffer, and references."""
    rows = np.frombuffer(view, np.uint8).reshape(-1, PAGE_SIZE)
    filled: list[NDArray[np.int64]] = []
    now: list[NDArray[np.int64]] = []
    count = 0
    for file in group:
        pages = np.flatnonzero(~zero[file.start : file.start + file.pages]) + file.start
        cut = zlib.crc32(file.path.encode("utf-8", "surrogateescape")) % _CUT_EVERY == 0
        if now and (cut or count + len(pages) > FRAME_PAGES):
            filled.append(np.concatenate(now))
            now, count = [], 0
        if len(pages):
            now.append(pages)
            count += len(pages)
    if now:
        filled.append(np.concatenate(now))
    gathered = [memoryview(np.ascontiguousarray(rows[pages]).reshape(-1).data) for pages in filled]
    yield from zip(filled, frames.store_shared(gathered), strict=True)
