"""Frozen repositories of every released format stay readable, and are built on, for ever."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from dbmodule.ident import BackupId, BackupType
from dbmodule.reports import VerifyLevel
from dbmodule.storage import LocalStore
from tests.fault import mini
from tests.formats.freeze import EXPECTED, HERE, digests

FROZEN = sorted(HERE.glob("*.tar.xz"))


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_a_frozen_repository_is_sound_restores_and_is_built_on(
    frozen: Path, tmp_path: Path
) -> None:
    with tarfile.open(frozen) as archive:
        archive.extractall(tmp_path / "repository", filter="data")
    expected = json.loads((tmp_path / "repository" / EXPECTED).read_text())
    (tmp_path / "repository" / EXPECTED).unlink()
    store = LocalStore(tmp_path / "repository")
    assert mini.opened(store).backup_ids(mini.CLUSTER) == sorted(expected["backups"])
    assert (mini.opened(store).vault is not None) == expected["encrypted"]
    report = mini.verify_all(store, VerifyLevel.FULL)
    assert (report.status, report.damage) == ("sound", [])
    for number, (backup, files) in enumerate(expected["backups"].items()):
        target = tmp_path / f"restored-{number}"
        mini.restore_to(store, BackupId(backup), target)
        assert digests(dict(mini.contents(target))).items() >= files.items()
    # The source is gone; its last state goes on from what was restored.
    (target / "backup_label").unlink(missing_ok=True)
    (target / "recovery.signal").unlink()
    manifest = mini.back_up(store, target, BackupType.INCR)
    assert manifest.pages_changed < manifest.pages_total / 2
    assert mini.verify_all(store).status == "sound"


def test_there_is_one_of_every_kind() -> None:
    assert {path.name for path in FROZEN} >= {"v1-plain.tar.xz", "v1-encrypted.tar.xz"}
