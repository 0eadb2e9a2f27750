"""Re-reading what is stored: every byte of every object against the hashes it was written under.

Documents and packs match their hashes and names, every frame can be decompressed to the bytes it
was made from, and every page map of every backup, folded along its chain, refers to frames and
slots that exist. The index, a mere hint, must list every pack that a backup needs all the same:
so a segment that is gone is found. Damage is reported, never raised. What cannot be told from an
expired backup is a manifest that is gone without a backup that depends on it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from dbmodule.ports import Cancelled, Progress
from dbmodule.registry import EntryKind
from dbmodule.reports import Damage, VerifyReport
from dbmodule.repository import index, pack
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.document import unseal
from dbmodule.repository.index import PackRef
from dbmodule.repository.repository import Repository, cluster_document, manifest_name

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

    def check(self, name: str, action: Callable[[], int]) -> None:
        """Count an object, and note what is wrong with it."""
        self.objects += 1
        try:
            self.bytes_read += action()
        except _DAMAGE as error:
            self.damage.append(Damage(name, error.message))


def verify(
    repository: Repository,
    cluster: str,
    wanted: Sequence[BackupId] | None,
    *,
    threads: int,
    progress: Progress,
    cancelled: Cancelled,
) -> VerifyReport:
    """Check the chains of the `wanted` backups, or every object in the repository for None."""
    began = time.monotonic()
    findings = _Findings()
    manifests = _manifests(repository, cluster, findings)
    indexed: set[pack.PackId] | None = None
    needed_packs: set[pack.PackId] = set()
    if wanted is None:
        _check_binding(repository, cluster, manifests, findings)
        indexed = _check_other_documents(repository, cluster, findings)
        chosen = list(manifests)
    else:
        chosen = list(wanted)
    packs: dict[str, PackRef | None] = {}
    if wanted is None:
        for name in repository.store.list(_PACKS):
            packs[name] = None
    needed: dict[BackupId, list[Manifest]] = {}
    for backup in chosen:
        try:
            chain = chain_of(manifests, backup)
            repository.check_chain(chain)
        except _DAMAGE as error:
            findings.damage.append(Damage(manifest_name(cluster, backup), error.message))
            continue
        needed[backup] = chain
        for manifest in chain:
            needed_packs |= _collect_packs(repository, manifest, packs, findings)
    if indexed is not None:
        findings.damage += [
            Damage(
                pack.name_of(missing),
                "no index segment lists it: a segment is missing, and what the pack holds would"
                " be stored again",
            )
            for missing in sorted(needed_packs - indexed)
        ]
    _check_packs(repository, packs, threads, findings, progress, cancelled)
    for number, chain in enumerate(needed.values()):
        progress("maps", number, len(needed))
        if cancelled():
            raise CancelledError("the verification was cancelled")
        name = manifest_name(cluster, chain[-1].backup_id)
        try:
            for problem in _check_maps(repository, chain):
                findings.damage.append(Damage(name, problem))
        except _DAMAGE as error:
            findings.damage.append(Damage(name, error.message))
    return VerifyReport(
        status=DAMAGED if findings.damage else SOUND,
        backups=[str(backup) for backup in chosen],
        objects_checked=findings.objects,
        bytes_read=findings.bytes_read,
        damage=findings.damage,
        seconds=round(time.monotonic() - began, 3),
    )


def _manifests(
    repository: Repository, cluster: str, findings: _Findings
) -> dict[BackupId, Manifest]:
    found: dict[BackupId, Manifest] = {}
    for backup in repository.backup_ids(cluster):

        def load(backup: BackupId = backup) -> int:
            found[backup], _ = repository.manifest(cluster, backup)
            return repository.store.size(manifest_name(cluster, backup))

        findings.check(manifest_name(cluster, backup), load)
    return found


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


def _check_other_documents(
    repository: Repository, cluster: str, findings: _Findings
) -> set[pack.PackId] | None:
    """Everything but packs and this cluster's manifests; `repository.json` was read already.

    Gives the packs that the index lists; None when a part of the index cannot be read.
    """
    store, key = repository.store, repository.key
    own = manifest_name(cluster, BackupId("")).rpartition("/")[0] + "/"
    for prefix in ("clusters/", "manifests/"):
        for name in store.list(prefix):
            if name.startswith(own):
                continue

            def read(name: str = name) -> int:
                data = store.get(name)
                unseal(name, data, key)
                return len(data)

            findings.check(name, read)
    if repository.vault is not None:
        _check_vault(repository.vault, findings)
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


def _collect_packs(
    repository: Repository,
    manifest: Manifest,
    packs: dict[str, PackRef | None],
    findings: _Findings,
) -> set[pack.PackId]:
    """Add the packs that a backup needs to `packs`; gives those that the index has to list."""
    root = PackRef(pack.PackId(manifest.root.pack), manifest.root.size, manifest.root.footer)
    packs[pack.name_of(root.pack)] = root
    try:
        refs = repository.tables(manifest).packs
    except _DAMAGE as error:
        name = manifest_name(manifest.cluster, manifest.backup_id)
        findings.damage.append(Damage(name, f"its tables cannot be read: {error.message}"))
        return set()
    packs.update({pack.name_of(ref.pack): ref for ref in refs})
    return {ref.pack for ref in refs}


def _check_packs(
    repository: Repository,
    packs: dict[str, PackRef | None],
    threads: int,
    findings: _Findings,
    progress: Progress,
    cancelled: Cancelled,
) -> None:
    def check(item: tuple[str, PackRef | None]) -> tuple[str, int, str | None]:
        name, ref = item
        if cancelled():
            return name, 0, None
        try:
            return name, check_pack(repository, name, ref), None
        except _DAMAGE as error:
            return name, 0, error.message

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for number, (name, size, problem) in enumerate(pool.map(check, packs.items())):
            findings.objects += 1
            findings.bytes_read += size
            if problem is not None:
                findings.damage.append(Damage(name, problem))
            progress("packs", number + 1, len(packs))
    if cancelled():
        raise CancelledError("the verification was cancelled")


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


def _check_maps(repository: Repository, chain: list[Manifest]) -> Iterator[str]:
    """What is wrong with the folded page maps of a backup."""
    view = ChainView(repository, chain)
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
