"""Re-reading what is stored, against the hashes it was written under, as closely as is asked for.

*quick* reads the documents and the tables of packs, and asks for the size of every pack that is
referred to. *normal* reads every byte of every object: documents and packs match their hashes and
names, every frame can be decompressed to the bytes it was made from, and every page map of every
backup, folded along its chain, refers to frames and slots that exist. The index, a mere hint, must
list every pack that a backup needs all the same: so a segment that is gone is found. *full* looks
at the pages themselves as well: see `pagecheck`.

Damage is reported, never raised. What cannot be told from an expired backup is a manifest that is
gone without a backup that depends on it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dbmodule.chain import chain_of
from dbmodule.delta import ZERO_FRAME
from dbmodule.errors import (
    CancelledError,
    CorruptObjectError,
    FormatVersionError,
    ObjectMissingError,
    RefusedError,
)
from dbmodule.ident import PAGE_SIZE, BackupId
from dbmodule.manifest import Manifest
from dbmodule.pagecheck import PageFindings, check_pages
from dbmodule.parallel import batches, in_order
from dbmodule.ports import Cancelled, Progress
from dbmodule.registry import EntryKind
from dbmodule.reports import Damage, VerifyLevel, VerifyReport
from dbmodule.repository import condemned, husk, index, pack
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.document import unseal
from dbmodule.repository.holds import PREFIX as HOLDS
from dbmodule.repository.holds import read_hold
from dbmodule.repository.index import PackRef
from dbmodule.repository.repository import (
    Repository,
    RevokedError,
    check_hashes,
    cluster_document,
    manifest_name,
)
from dbmodule.repository.tables import FileEntry
from dbmodule.repository.usage import Usage

if TYPE_CHECKING:
    from dbmodule.repository.vault import Vault

SOUND = "sound"
DAMAGED = "damaged"
_PACKS = "packs/"
_DAMAGE = (CorruptObjectError, ObjectMissingError, FormatVersionError, RefusedError)


@dataclass(slots=True)
class _Findings:
    damage: list[Damage] = field(default_factory=list)
    objects: int = 0
    bytes_read: int = 0
    pages: int = 0
    known_corrupt: int = 0

    def check(self, name: str, action: Callable[[], int]) -> None:
        """Count an object that was listed, and note what is wrong with it."""
        self.objects += 1
        try:
            self.bytes_read += action()
        except ObjectMissingError:
            self.objects -= 1  # an expiry has removed it since
        except _DAMAGE as error:
            self.damage.append(Damage(name, error.message))


def verify(
    repository: Repository,
    cluster: str,
    wanted: Sequence[BackupId] | None,
    *,
    level: VerifyLevel = VerifyLevel.NORMAL,
    threads: int,
    progress: Progress,
    cancelled: Cancelled,
) -> VerifyReport:
    """Check the chains of the `wanted` backups, or every object in the repository for None."""
    quick = level is VerifyLevel.QUICK
    began = time.monotonic()
    findings = _Findings()
    manifests, hashes = _manifests(repository, cluster, findings)
    indexed: set[pack.PackId] | None = None
    usage = Usage(repository)
    seen: set[BackupId] = set()
    if wanted is None:
        _check_binding(repository, cluster, manifests, findings)
        _check_other_documents(repository, cluster, findings)
        indexed = None if quick else _check_index(repository, findings)
        chosen = list(manifests)
    else:
        chosen = list(wanted)
    packs: dict[str, PackRef | None] = {}
    if wanted is None and not quick:
        for name in repository.store.list(_PACKS):
            packs[name] = None
    needed: dict[BackupId, list[Manifest]] = {}
    for backup in chosen:
        try:
            chain = chain_of(manifests, backup)
            # By the hashes that were read: each chain from its beginning would be the square of
            # them, and an expiry may have removed some since.
            check_hashes(chain, [hashes[manifest.backup_id] for manifest in chain])
        except _DAMAGE as error:
            findings.damage.append(Damage(manifest_name(cluster, backup), error.message))
            continue
        needed[backup] = chain
        for manifest in chain:
            if manifest.backup_id in seen:
                continue
            seen.add(manifest.backup_id)
            try:
                usage.add(manifest)
            except _DAMAGE as error:
                name = manifest_name(manifest.cluster, manifest.backup_id)
                findings.damage.append(Damage(name, error.message))
    packs.update({pack.name_of(ref.pack): ref for ref in usage.needed.values()})
    if indexed is not None:
        findings.damage += [
            Damage(
                pack.name_of(missing),
                "no index segment lists it: a segment is missing, and what the pack holds would"
                " be stored again",
            )
            for missing in sorted(usage.needed.keys() - usage.roots - indexed)
        ]
    check = check_size if quick else check_pack
    _check_packs(repository, packs, check, threads, findings, progress, cancelled)
    for number, chain in enumerate([] if quick else needed.values()):
        progress("maps", number, len(needed))
        if cancelled():
            raise CancelledError("the verification was cancelled")
        name = manifest_name(cluster, chain[-1].backup_id)
        try:
            view = ChainView(repository, chain)
            for problem in _check_maps(repository, view):
                findings.damage.append(Damage(name, problem))
            if level is VerifyLevel.FULL:
                # What the baseline stored was looked at with the baseline, if in the same way.
                inherited = chain[-1].baseline_id not in needed or (
                    chain[-1].data_checksums != chain[-2].data_checksums
                )
                _check_pages(repository, view, inherited, threads, findings, progress, cancelled)
        except _DAMAGE as error:
            findings.damage.append(Damage(name, error.message))
    return VerifyReport(
        status=DAMAGED if findings.damage else SOUND,
        backups=[str(backup) for backup in chosen],
        objects_checked=findings.objects,
        bytes_read=findings.bytes_read,
        damage=findings.damage,
        seconds=round(time.monotonic() - began, 3),
        level=level,
        pages_checked=findings.pages,
        pages_known_corrupt=findings.known_corrupt,
    )


def _manifests(
    repository: Repository, cluster: str, findings: _Findings
) -> tuple[dict[BackupId, Manifest], dict[BackupId, str]]:
    """The manifests of a cluster that can be read, and their hashes."""
    found: dict[BackupId, Manifest] = {}
    hashes: dict[BackupId, str] = {}
    for backup in repository.taken_ids(cluster):

        def load(backup: BackupId = backup) -> int:
            with suppress(RevokedError):
                found[backup], hashes[backup] = repository.manifest(cluster, backup)
            return repository.store.size(manifest_name(cluster, backup))

        findings.check(manifest_name(cluster, backup), load)
    return found, hashes


def _check_binding(
    repository: Repository,
    cluster: str,
    manifests: Mapping[BackupId, Manifest],
    findings: _Findings,
) -> None:
    """Is the cluster's name tied to the database cluster that its backups are of?"""
    name = cluster_document(cluster)
    try:
        bound = repository.bound_to(cluster)
    except _DAMAGE as error:
        if manifests:
            findings.damage.append(Damage(name, error.message))
        return
    others = [m for m in manifests.values() if str(m.system_identifier) != bound]
    if others:
        findings.damage.append(
            Damage(name, f"names another database cluster than backup {others[0].backup_id}")
        )


def _check_other_documents(repository: Repository, cluster: str, findings: _Findings) -> None:
    """Documents but this cluster's manifests; `repository.json` was read already."""
    store, key = repository.store, repository.key
    own = manifest_name(cluster, BackupId("")).rpartition("/")[0] + "/"
    for prefix in ("clusters/", "manifests/", condemned.PREFIX, husk.PREFIX):
        for name in store.list(prefix):
            if name.startswith(own):
                continue

            def read(name: str = name) -> int:
                data = store.get(name)
                unseal(name, data, key)
                return len(data)

            findings.check(name, read)
    for name in store.list(HOLDS):

        def read_held(name: str = name) -> int:
            read_hold(repository, name)
            return store.size(name)

        findings.check(name, read_held)
    if repository.vault is not None:
        _check_vault(repository.vault, findings)


def _check_index(repository: Repository, findings: _Findings) -> set[pack.PackId] | None:
    """The packs that the index lists; None when a part of the index cannot be read."""
    store, key = repository.store, repository.key
    indexed: set[pack.PackId] = set()
    before = len(findings.damage)
    for name in store.list(index.PREFIX):

        def read_index(name: str = name) -> int:
            data = store.get(name)
            indexed.update(ref.pack for ref in index.check(name, data, key))
            return len(data)

        findings.check(name, read_index)
    return indexed if len(findings.damage) == before else None


def _check_vault(vault: Vault, findings: _Findings) -> None:
    """Master keys, as far as can be told without them, and objects that do not belong there."""
    for key_id in vault.keyring.key_ids():
        findings.check(f"keys/{key_id}.json", functools.partial(vault.keyring.check, key_id))
    findings.damage += [
        Damage(name, "is no object of this repository: it was renamed, or put there")
        for name in vault.store.strangers()
    ]


def _check_packs(
    repository: Repository,
    packs: dict[str, PackRef | None],
    check: Callable[[Repository, str, PackRef | None], int],
    threads: int,
    findings: _Findings,
    progress: Progress,
    cancelled: Cancelled,
) -> None:
    def check_one(item: tuple[str, PackRef | None]) -> tuple[str, int, str | None]:
        name, ref = item
        if cancelled():
            return name, 0, None
        try:
            return name, check(repository, name, ref), None
        except ObjectMissingError as error:
            # Of those that nothing needs an expiry may have removed some since they were listed.
            return name, 0, None if ref is None else error.message
        except _DAMAGE as error:
            return name, 0, error.message

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for number, (name, size, problem) in enumerate(pool.map(check_one, packs.items())):
            findings.objects += 1
            findings.bytes_read += size
            if problem is not None:
                findings.damage.append(Damage(name, problem))
            progress("packs", number + 1, len(packs))
    if cancelled():
        raise CancelledError("the verification was cancelled")


def check_size(repository: Repository, name: str, ref: PackRef | None) -> int:
    """Is a pack there, as long as it was written? Reads nothing of it."""
    size = repository.store.size(name)
    if ref is not None and size != ref.size:
        raise CorruptObjectError(f"{name}: has {size} bytes instead of {ref.size}")
    return 0


def check_pack(repository: Repository, name: str, ref: PackRef | None) -> int:
    """Check every byte of a pack; gives its size. Raises `CorruptObjectError` and the like."""
    data = memoryview(repository.store.get(name))
    if ref is not None and len(data) != ref.size:
        raise CorruptObjectError(f"{name}: has {len(data)} bytes instead of {ref.size}")
    footer = pack.open_whole(name, data, repository.key)
    for number in range(len(footer.entries)):
        start = int(footer.offsets[number])
        stored = data[start : start + int(footer.entries["stored"][number])]
        repository.frames.decode(footer, number, stored)
    return len(data)


def _check_pages(
    repository: Repository,
    view: ChainView,
    inherited: bool,
    threads: int,
    findings: _Findings,
    progress: Progress,
    cancelled: Cancelled,
) -> None:
    """Add what is wrong with the pages of a backup."""
    name = manifest_name(view.chain[-1].cluster, view.chain[-1].backup_id)
    total = sum(entry.size for entry in view.files.values())
    done = 0

    def check(batch: list[FileEntry]) -> list[PageFindings]:
        found = []
        for entry in batch:
            try:
                found.append(check_pages(view, repository.frames, entry.path, inherited=inherited))
            except _DAMAGE as error:
                found.append(PageFindings(problems=[f"{entry.path}: {error.message}"]))
        return found

    grouped = batches(view.files.values(), lambda entry: entry.size)
    running = in_order(check, grouped, threads=threads, name="verify")
    with closing(running):
        for batch, results in running:
            for found in results:
                findings.pages += found.pages
                findings.known_corrupt += found.known_corrupt
                findings.damage += [Damage(name, problem) for problem in found.problems]
            done += sum(entry.size for entry in batch)
            progress("pages", done, total)
            if cancelled():
                raise CancelledError("the verification was cancelled")


def _check_maps(repository: Repository, view: ChainView) -> Iterator[str]:
    """What is wrong with the folded page maps of a backup."""
    lengths: dict[int, np.ndarray[tuple[int], np.dtype[np.uint32]]] = {}
    for path, entry in view.files.items():
        if entry.kind not in (EntryKind.RELATION, EntryKind.CONTENT):
            continue
        refs = view.page_map(path).refs
        stored = refs[refs["frame"] != ZERO_FRAME]
        for number in np.unique(stored["pack"]).tolist():
            if number not in lengths:
                entries = repository.frames.footer(view.packs[number]).entries
                lengths[number] = entries["raw"].astype(np.uint32)
            mine = stored[stored["pack"] == number]
            if int(mine["frame"].max()) >= len(lengths[number]):
                yield f"{path}: refers to a frame that its pack does not have"
                continue
            raw = lengths[number][mine["frame"]]
            if (mine["slot"].astype(np.int64) * PAGE_SIZE >= raw).any():
                yield f"{path}: refers to a page that its frame does not have"
