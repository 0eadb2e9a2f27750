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

import numpy as np

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
    options = parser.parse_args()
    packs = max(1, round(options.entries / PER_PACK))
    base = options.directory or Path(tempfile.mkdtemp(prefix="dbmodule-bench-"))
    store = LocalStore(base)
    try:
        report: dict[str, object] = {"entries": packs * PER_PACK, "packs": packs}
        if not list(store.list(index.PREFIX)):
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
            rate = look_up(found, packs, hits=hits, seconds=options.seconds)
            report[f"{name}_per_second"] = round(rate)
        report["peak_mb"] = peak_mb()
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    finally:
        if options.directory is None:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
