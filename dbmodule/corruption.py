"""Corrupt pages: which earlier backup holds the last good copy of each.

A page that fails its checksum for good is stored as it was found, and its mark says *unknown*. So
wherever a backup of a cluster with checksums has a known mark of the page, it stored a copy that
passed. Nothing here reads the copies themselves: that is for `verify` and `restore`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from dbmodule import datafile
from dbmodule.chain import chain_of
from dbmodule.errors import BrokenChainError, RepositoryError
from dbmodule.ident import BackupId, SystemId
from dbmodule.manifest import Corruption, Manifest
from dbmodule.registry import UNKNOWN_LSN, EntryKind
from dbmodule.repository.chainview import ChainView
from dbmodule.repository.repository import Repository

log = logging.getLogger(__name__)


def last_good(
    repository: Repository, backups: Mapping[BackupId, Manifest], manifest: Manifest
) -> dict[Corruption, BackupId]:
    """Where the last good copy of each page is that `manifest` lists as corrupt, if anywhere."""
    earlier = {name: found for name, found in backups.items() if name < manifest.backup_id}
    chain: Sequence[Manifest] = ()
    if manifest.baseline_id is not None and manifest.baseline_id in backups:
        chain = chain_of(backups, manifest.baseline_id)
    return find_good(repository, earlier, chain, manifest.system_identifier, manifest.corruption)


def find_good(
    repository: Repository,
    backups: Mapping[BackupId, Manifest],
    chain: Sequence[Manifest],
    system_identifier: SystemId,
    pages: Sequence[Corruption],
) -> dict[Corruption, BackupId]:
    """The newest of `backups` with a good copy of each of `pages`; those of `chain` come first.

    Backups that cannot be read are passed over.
    """
    own = {member.backup_id: member for member in chain}
    others = {name: found for name, found in backups.items() if name not in own}
    missing = list(pages)
    good: dict[Corruption, BackupId] = {}
    for candidate in [*_newest_first(own), *_newest_first(others)]:
        if not missing:
            break
        if candidate.system_identifier != system_identifier or not candidate.data_checksums:
            continue
        try:
            members = chain_of({**backups, **own}, candidate.backup_id)
            intact = _intact(ChainView(repository, members), missing)
        except (BrokenChainError, RepositoryError) as error:
            log.warning("backup %s is passed over: %s", candidate.backup_id, error)
            continue
        good.update(dict.fromkeys(intact, candidate.backup_id))
        missing = [page for page in missing if page not in intact]
    return good


def _newest_first(backups: Mapping[BackupId, Manifest]) -> list[Manifest]:
    return [backups[name] for name in sorted(backups, reverse=True)]


def _intact(view: ChainView, pages: Sequence[Corruption]) -> set[Corruption]:
    """Those of `pages` that the last backup of a chain holds a good copy of."""
    by_path: dict[str, list[Corruption]] = defaultdict(list)
    for page in pages:
        by_path[page.path].append(page)
    intact: set[Corruption] = set()
    for path, wanted in by_path.items():
        relation, entry = datafile.relation(path), view.files.get(path)
        if relation is None or entry is None or entry.kind is not EntryKind.RELATION:
            continue
        first = relation.first_block(view.chain[-1].blocks_per_segment)
        known = np.flatnonzero(view.prints(path)["lsn"] != UNKNOWN_LSN) + first
        sound = np.isin([page.block for page in wanted], known).tolist()
        intact.update(page for page, is_sound in zip(wanted, sound, strict=True) if is_sound)
    return intact
