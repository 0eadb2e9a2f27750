"""Values for the unit tests of the core and the repository: built by hand, or by hypothesis.

`quick` bounds a property test and makes it repeatable: no deadline, examples derived from the test
itself and not from chance or from an earlier run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dbmodule import page
from dbmodule.delta import FRAME_PAGES, REF, ZERO_FRAME, Refs
from dbmodule.ident import PAGE_SIZE, BackupId, BackupType, Lsn, SystemId, Timeline
from dbmodule.manifest import Corruption, Manifest, Mark, Root
from dbmodule.registry import EntryFlag, EntryKind, FileIdentity
from dbmodule.repository.frames import FrameReader
from dbmodule.repository.tables import FileEntry
from dbmodule.repository.writer import FrameWriter
from dbmodule.storage import MemoryStore

KEY = bytes(range(32))
LEVEL = 1
NOWHERE = FileIdentity(0, 0, 0, 0, 0)
WAL_SEGMENT = 16 << 20


def quick(examples: int) -> settings:
    """Settings of a property test with this many examples."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def chunk(number: int, length: int = PAGE_SIZE) -> bytes:
    """Bytes that differ from those of any other number, in places all over the chunk."""
    return (number.to_bytes(8, "little") * (PAGE_SIZE // 8))[:length]


def random_bytes(seed: int, length: int) -> bytes:
    """Bytes that do not compress."""
    return np.random.default_rng(seed).bytes(length)


def relation_page(lsn: int, checksum: int, *, filler: int = 0x5A) -> bytes:
    """A page whose header says what the server's would."""
    header = np.zeros(1, page.PAGE_HEADER)
    header["xlogid"], header["xrecoff"] = lsn >> 32, lsn & 0xFFFFFFFF
    header["checksum"], header["lower"], header["upper"] = checksum, 28, 8000
    header["special"], header["pagesize_version"] = PAGE_SIZE, PAGE_SIZE | 4
    return header.tobytes() + bytes([filler]) * (PAGE_SIZE - header.nbytes)


def writer(store: MemoryStore) -> FrameWriter:
    return FrameWriter(store, KEY, FrameReader(store, KEY), LEVEL)


def entry(path: str, kind: EntryKind = EntryKind.CONTENT, **changes: Any) -> FileEntry:
    return dataclasses.replace(FileEntry(path, kind, EntryFlag.NONE, 0o600, 0, NOWHERE), **changes)


def backup_id(number: int, kind: BackupType) -> BackupId:
    """Ids that sort by `number`."""
    return BackupId(f"20260131-{number:06d}-{kind}-{number:06x}")


def manifest(
    number: int = 1,
    kind: BackupType = BackupType.FULL,
    baseline: BackupId | None = None,
    **changes: Any,
) -> Manifest:
    """A sound manifest; those of higher numbers finished later."""
    started = datetime(2026, 1, 31, tzinfo=UTC) + timedelta(minutes=number)
    made = Manifest(
        backup_id=backup_id(number, kind),
        type=kind,
        cluster="main",
        baseline_id=baseline,
        baseline_hash=None if baseline is None else "0" * 64,
        status="completed",
        label="nightly",
        job_id=None,
        offline=False,
        system_identifier=SystemId(7_600_000_000_000_000_001),
        server_version="18.6",
        version_num=180006,
        catalog_version=202506291,
        block_size=PAGE_SIZE,
        blocks_per_segment=131072,
        wal_segment_size=WAL_SEGMENT,
        data_checksums=True,
        wal_log_hints=False,
        timeline=Timeline(1),
        start_lsn=Lsn(0x3000028),
        stop_lsn=Lsn(0x3000120),
        history="",
        marks=(Mark("ab" * 16, 733, "base/5/16400", 0, 1),),
        boot_id="",
        host="",
        backup_label="START WAL LOCATION: 0/3000028\n",
        tablespace_map="",
        tablespaces={},
        late_unlogged=(),
        created_tablespaces={},
        owner="postgres",
        detector="scan",
        detector_reason="the only one",
        started_at=started,
        finished_at=started + timedelta(seconds=30),
        files_total=3,
        files_read=2,
        files_skipped=1,
        pages_total=5,
        pages_changed=4,
        pages_stored=3,
        pages_verified=4,
        divergent_pages=0,
        hint_pages=0,
        bytes_total=40960,
        bytes_read=40960,
        bytes_changed=32768,
        bytes_stored=20000,
        wal_bytes=WAL_SEGMENT,
        corruption=(
            Corruption(
                "base/5/16401",
                7,
                Lsn(0x2000000),
                1,
                2,
                database_name="app",
                relation_name="public.a_idx",
                table_name="public.a",
                last_good=BackupId("20260130-000000-full-0a0b0c"),
            ),
        ),
        corrupt_pages=1,
        phases={"copy": 0.5},
        root=Root("ab" * 32, 4000, 200),
    )
    return dataclasses.replace(made, **changes)


def refs_of(triples: Sequence[tuple[int, int, int]]) -> Refs:
    return np.array(triples, REF) if triples else np.empty(0, REF)


@st.composite
def block_refs(
    draw: st.DrawFn, max_blocks: int = 60
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Ascending blocks and a reference for each, with runs in frames and zero blocks likely."""
    blocks = sorted(draw(st.sets(st.integers(0, max_blocks - 1))))
    triples: list[tuple[int, int, int]] = []
    for _ in blocks:
        step = draw(st.sampled_from(["next", "next", "zero", "new"]))
        pack, frame, slot = triples[-1] if triples else (0, 0, 0)
        if step == "zero":
            triples.append((0, ZERO_FRAME, 0))
        elif step == "next" and frame != ZERO_FRAME and slot + 1 < FRAME_PAGES:
            triples.append((pack, frame, slot + 1))
        else:
            fresh = (
                st.integers(0, 2) | st.just(0xFFFFFFFF),
                st.integers(0, 3) | st.just((1 << 24) - 1),
                st.integers(0, FRAME_PAGES - 1),
            )
            triples.append(draw(st.tuples(*fresh)))
    return blocks, triples
