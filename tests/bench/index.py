"""The content index at scale: build it with the shipped writer and merge, then look hashes up.

    python -m tests.bench.index --entries 1e8 [--directory DIR] [--keep]

Segments over the footers of some packs are written as a backup does, and after every few of them
the index is merged as at the end of a backup. Of the packs only names and footers are real: those
of 32 MB packs whose frames hold 32 hashed pages each, the hashes random. Look-ups are made as a
backup makes them, 256 hashes at a time, at random: *hits* of pages that are there, each with its
pack's reference, and *misses*. The caches of this process are empty at first; the kernel's is left
as it is.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbmodule.ports import never_cancelled
from dbmodule.repository import index, merge
from dbmodule.repository.lookup import ContentIndex
from dbmodule.repository.pack import ENTRY, FOOTER, Footer, PackId, keyed, name_of
from dbmodule.storage import LocalStore

KEY = bytes(range(32))
FRAMES = 320
"""Of a 32 MB pack of pages that compress to 40 %."""
PAGES = 32
PER_PACK = FRAMES * (1 + PAGES)
PACKS_PER_SEGMENT = 25
BATCH = 256


def footer_of(number: int) -> Footer:
    """The footer of pack `number`, always the same."""
    chance = np.random.default_rng(number)
    entries = np.zeros(FRAMES, ENTRY)
    entries["stored"], entries["raw"] = 104_000, PAGES * 8192
    entries["encoding"], entries["hashed_pages"] = 1, PAGES
    entries["hash"] = np.frombuffer(chance.bytes(32 * FRAMES), "V32")
    head = FOOTER.pack(FRAMES, FRAMES * PAGES, 16 + 104_000 * FRAMES, bytes(32))
    data = head + entries.tobytes() + chance.bytes(16 * FRAMES * PAGES)
    return Footer.parse(PackId(keyed(KEY, data).hex()), data)


def peak_mb() -> int:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def build(store: LocalStore, packs: int, segments_per_backup: int) -> dict[str, float]:
    """Write and merge; seconds of each."""
    spent = {"write": 0.0, "merge": 0.0}
    written = 0
    for number, first in enumerate(range(0, packs, PACKS_PER_SEGMENT), 1):
        footers = [footer_of(n) for n in range(first, min(first + PACKS_PER_SEGMENT, packs))]
        began = time.monotonic()
        for name, chunks in index.encode(footers, KEY):
            written += store.put_new(name, chunks)
        spent["write"] += time.monotonic() - began
        if number % segments_per_backup == 0 or first + PACKS_PER_SEGMENT >= packs:
            began = time.monotonic()
            merge.tidy(store, KEY, never_cancelled)
            spent["merge"] += time.monotonic() - began
            done = (first + PACKS_PER_SEGMENT) * PER_PACK
            sys.stderr.write(f"{done:.2e} entries, {spent}, peak {peak_mb()} MB\n")
    return spent


PART = 1 << 20
"""Entries of a run that are made at a time."""


def part_of(number: int, entries: int, packs: int) -> NDArray[Any]:
    """Entries of part `number` of a sorted run of so many, always the same."""
    parts = -(-entries // PART)
    chance = np.random.default_rng([number, 11])
    made = np.empty(min(PART, entries - number * PART), index.ENTRY)
    first, past = number * 2**64 // parts, (number + 1) * 2**64 // parts
    made["high"] = np.sort(chance.integers(first, past, len(made), np.uint64))
    made["low"] = chance.integers(0, 2**64, len(made), np.uint64)
    made["pack"] = chance.integers(0, packs, len(made))
    made["place"] = chance.integers(0, FRAMES, len(made)) << 8
    made["place"] |= chance.integers(0, PAGES, len(made)).astype(np.uint32)
    return made


def write_run(store: LocalStore, entries: int, packs: int) -> None:
    """One sorted run, cut into segments and written as a merge does it at its end."""
    table = np.empty(packs, index.PACK)
    table["id"] = np.frombuffer(np.random.default_rng(5).bytes(32 * packs), "V32")
    table["size"], table["footer"] = 33_000_000, 178_000
    parts = (part_of(number, entries, packs) for number in range(-(-entries // PART)))
    for number, (part, first, last) in enumerate(index.cut(parts), 1):
        name, chunks = index.seal(table, part, first, last, [], KEY)
        store.put_new(name, chunks)
        if number % 50 == 0:
            sys.stderr.write(f"{number} segments, peak {peak_mb()} MB\n")


def look_up_in_run(found: ContentIndex, entries: int, packs: int, seconds: float) -> float:
    """Look-ups per second of pages that are in a run made by `write_run`."""
    chance = np.random.default_rng([7, 8])
    spent, count = 0.0, 0
    while spent < seconds:
        chosen = []
        for number in chance.integers(-(-entries // PART), size=4).tolist():
            part = part_of(number, entries, packs)
            chosen.append(part[chance.integers(len(part), size=BATCH // 4)])
        wanted = np.concatenate(chosen).astype(index.ENTRY)
        hashes = [row.tobytes()[:16] for row in wanted]
        began = time.perf_counter()
        answers = found.find_many(hashes, whole=False)
        spent += time.perf_counter() - began
        count += len(hashes)
        for row, answer in zip(wanted, answers, strict=True):
            if answer is None or answer.frame << 8 | answer.slot != row["place"]:
                raise SystemExit("the index gave a wrong answer")
    return count / spent


def look_up(found: ContentIndex, packs: int, *, hits: bool, seconds: float) -> float:
    """Look-ups per second, checked; whatever is done to make hashes is not counted."""
    chance = np.random.default_rng([7, 7])  # none of `footer_of`
    spent, count = 0.0, 0
    while spent < seconds:
        if hits:
            footers = [footer_of(int(n)) for n in chance.integers(packs, size=8)]
            slots = [chance.integers(FRAMES * PAGES, size=BATCH // 8) for _ in footers]
            places = [
                (f.pack, int(s) // PAGES, int(s) % PAGES)
                for f, chosen in zip(footers, slots, strict=True)
                for s in chosen
            ]
            hashes = [
                bytes(f.page_hashes[int(s)])
                for f, chosen in zip(footers, slots, strict=True)
                for s in chosen
            ]
        else:
            places, hashes = [], [chance.bytes(16) for _ in range(BATCH)]
        began = time.perf_counter()
        answers = found.find_many(hashes, whole=False)
        spent += time.perf_counter() - began
        count += len(hashes)
        got = [(a.pack.pack, a.frame, a.slot) for a in answers if a is not None]
        if got != places:
            raise SystemExit("the index gave a wrong answer")
    return count / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=float, default=1e7)
    parser.add_argument("--directory", type=Path, help="build, or use what is there, and keep it")
    parser.add_argument("--segments", type=int, default=24, help="of a backup; then comes a merge")
    parser.add_argument("--seconds", type=float, default=20.0, help="per kind of look-up")
    parser.add_argument(
        "--run", action="store_true", help="write one sorted run, without any merging"
    )
    options = parser.parse_args()
    packs = max(1, round(options.entries / PER_PACK))
    base = options.directory or Path(tempfile.mkdtemp(prefix="dbmodule-bench-"))
    store = LocalStore(base)
    try:
        report: dict[str, object] = {"entries": packs * PER_PACK, "packs": packs}
        if options.run and not list(store.list(index.PREFIX)):
            began = time.monotonic()
            write_run(store, packs * PER_PACK, packs)
            report |= {"build_seconds": round(time.monotonic() - began), "build_peak_mb": peak_mb()}
        elif not list(store.list(index.PREFIX)):
            # The merge asks which packs are there.
            for number in range(packs):
                path = base / name_of(footer_of(number).pack)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            began = time.monotonic()
            spent = build(store, packs, options.segments)
            report |= {f"{name}_seconds": round(s) for name, s in spent.items()}
            report |= {"build_seconds": round(time.monotonic() - began), "build_peak_mb": peak_mb()}
        began = time.monotonic()
        found = ContentIndex(store, KEY)
        report["open_seconds"] = round(time.monotonic() - began, 2)
        opened, _ = index.open_segments(store, KEY)
        report |= {
            "segments": len(opened),
            "lanes": [index.entries_in(row) for row in index.lanes(opened)],
            "bytes": sum(store.size(segment.name) for segment in opened),
        }
        del opened
        for hits, name in ((True, "hits"), (False, "misses")):
            if hits and options.run:
                rate = look_up_in_run(found, packs * PER_PACK, packs, options.seconds)
            else:
                rate = look_up(found, packs, hits=hits, seconds=options.seconds)
            report[f"{name}_per_second"] = round(rate)
        report["peak_mb"] = peak_mb()
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    finally:
        if options.directory is None:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
