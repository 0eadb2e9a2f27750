"""Encrypted repositories on a real server: all works as ever, and what is stored tells nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dbmodule_cli.main import run
from pydantic import SecretStr

from dbmodule.app import App
from dbmodule.config import RepositorySection
from dbmodule.errors import RefusedError
from dbmodule.repository.repository import DESCRIPTION, Repository
from dbmodule.repository.secret import Secret
from dbmodule.storage import LocalStore
from tests import ddl, oracles, workload
from tests.fix_backup import Site, SiteFactory
from tests.fix_s3 import S3

ROOT = Path(__file__).parents[2]
LABEL = "before-the-migration"
CLUSTER = "orders"


def encrypted(made: Site, repository: RepositorySection) -> Site:
    """The same site with another, encrypted repository."""
    config = made.config.model_copy(update={"repository": repository})
    site = replace(made, app=App.open(config), config=config, copies=made.copies)
    report = site.app.init(config_path=site.base / "encrypted.toml", extension=True)
    assert report.encrypted
    return site


@pytest.fixture
def site(make_site: SiteFactory) -> Site:
    made = make_site()
    key_file = made.base / "master.key"
    return encrypted(
        made,
        RepositorySection(url=str(made.base / "encrypted"), cluster=CLUSTER, key_file=key_file),
    )


def stored(site: Site) -> dict[str, bytes]:
    root = site.base / "encrypted"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_chain_restores_byte_for_byte(site: Site) -> None:
    workload.set_up(site.cluster)
    full = site.full(label=LABEL)
    workload.run_round(site.cluster, 1)
    site.diff()
    workload.run_round(site.cluster, 2)
    site.cluster.stop("fast")
    last = site.incr(offline=True)
    restored = site.restore()
    copy = site.clusters.directory() / "copy"
    shutil.copytree(site.cluster.datadir, copy, symlinks=True)
    assert oracles.byte_oracle(restored, copy) == []
    synthetic = site.app.synthesize(last.backup_id)
    assert oracles.byte_oracle(site.restore(synthetic.backup_id), copy) == []
    assert site.app.verify(None).status == "sound"
    told = [CLUSTER, LABEL, full.system_identifier, "pg_control", "PG_VERSION"]
    told += [backup.backup_id for backup in site.app.backups()]
    told += [full.started_at[:10], full.backup_id[:8], "round 1", "account", str(site.base)]
    objects = stored(site)
    assert len(objects) > 10
    for name, data in objects.items():
        for word in told:
            assert word not in name, name
            assert word.encode() not in data, name
    for name, data in objects.items():
        # What is encrypted cannot be compressed.
        if len(data) > 4096:
            assert len(set(data[:4096])) > 240, name
    before = stored(site)
    dry = site.full(offline=True, dry_run=True)
    assert stored(site) == before
    second = site.full(offline=True)
    assert 0 < dry.bytes_stored <= second.bytes_stored + 4096
    assert second.bytes_stored < full.bytes_stored / 2


def test_in_the_place_of_an_encrypted_repository_no_other_is_used(site: Site) -> None:
    site.full()
    root = site.base / "encrypted"
    plain = site.base / "plain"
    Repository.create(LocalStore(plain))
    (root / DESCRIPTION).unlink()
    shutil.copy(plain / DESCRIPTION, root / DESCRIPTION)
    before = stored(site)
    for action in (site.full, site.diff, site.app.backups, site.restore):
        with pytest.raises(RefusedError, match="not encrypted"):
            action()
    key_file = site.config.repository.key_file
    assert key_file is not None
    key_file.unlink()
    with pytest.raises(RefusedError, match="not encrypted"):
        site.app.init(config_path=site.base / "encrypted.toml", extension=False)
    assert stored(site) == before
    assert not key_file.exists()


def test_on_s3(make_site: SiteFactory, s3: S3) -> None:
    made = make_site()
    options = s3.options()
    key = SecretStr(Secret.new().text.decode())
    site = encrypted(made, RepositorySection(url=s3.url(), options=options, key=key))
    ddl.table(site.cluster, "t", rows=30_000)
    site.full()
    site.cluster.execute("UPDATE t SET filler = md5(filler) WHERE i % 200 = 0")
    report = site.diff()
    assert report.pages_changed < report.pages_total / 2
    assert oracles.digests(site.start_copy(report.backup_id)) == oracles.digests(site.cluster)
    assert site.app.verify(None).status == "sound"


# --- the command line ----------------------------------------------------------------------------


class Shell:
    """Runs `dbmodule` in this process, and keeps all that it prints."""

    def __init__(
        self, site: Site, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self._patch = patch
        self._capture = capture
        self.printed = ""
        patch.chdir(site.base)
        patch.setenv("DBMODULE_CONFIG", str(site.base / "cli.toml"))

    def __call__(self, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, Any]:
        with self._patch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            code = run([*arguments, "--json", "--debug"])
        out, err = self._capture.readouterr()
        self.printed += out + err
        return code, json.loads(out)

    def refused(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """The message of a refusal for want of the right key."""
        code, document = self(*arguments, env=env)
        assert (code, document["error"]["code"]) == (5, "master_key"), document
        assert document["error"]["hint"]
        return str(document["error"]["message"])


@pytest.fixture
def plain_site(make_site: SiteFactory) -> Site:
    return make_site()


@pytest.fixture
def shell(
    plain_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    return Shell(plain_site, monkeypatch, capsys)


def test_keys_on_the_command_line(plain_site: Site, shell: Shell) -> None:
    site = plain_site
    config, key_file = site.base / "cli.toml", site.base / "cli.key"
    new = ["--dsn", site.cluster.dsn(), "--repo", str(site.base / "cli"), "--no-extension"]
    code, made = shell("init", *new, "--key-file", "cli.key")
    assert (code, made["encrypted"], made["repository_created"]) == (0, True, True)
    assert any(str(key_file) in finding["evidence"] for finding in made["findings"])
    assert f'key_file = "{key_file}"' in config.read_text()
    first = key_file.read_text().strip()
    code, again = shell("init", *new)
    assert (code, again["encrypted"], again["repository_created"]) == (0, True, False)
    assert (shell("backup", "full")[0], key_file.read_text().strip()) == (0, first)
    findings = shell("check")[1]["findings"]
    assert "on, 1 master key" in [f["evidence"] for f in findings if f["name"] == "encryption"]

    code, added = shell("key", "add", "--new-key-file", "safe.key", "--label", "in the safe")
    assert (code, added["label"], added["current"]) == (0, "in the safe", False)
    safe = (site.base / "safe.key").read_text().strip()
    code, rotated = shell("key", "rotate", "--new-key-command", f"echo {'ef' * 32}")
    assert code == 0
    # The old key opens nothing, the two others do, wherever they come from.
    assert "revoked" in shell.refused("list")
    for env in (
        {"DBMODULE_REPOSITORY__KEY": safe},
        {"DBMODULE_REPOSITORY__KEY_FILE": str(site.base / "safe.key")},
        {"DBMODULE_REPOSITORY__KEY": "ef" * 32},
    ):
        code, listed = shell("list", env=env)
        assert (code, len(listed["backups"])) == (0, 1)
    env = {"DBMODULE_REPOSITORY__KEY": safe}
    code, keys = shell("key", "list", env=env)
    assert {(key["key_id"], key["label"], key["current"]) for key in keys["keys"]} == {
        (added["key_id"], "in the safe", True),
        (rotated["added"]["key_id"], "", False),
    }
    assert shell("key", "revoke", added["key_id"], env=env)[0] == 2
    assert shell("key", "revoke", rotated["added"]["key_id"], env=env) == (
        0,
        {"revoked": rotated["added"]["key_id"]},
    )
    assert "revoked" in shell.refused("list", env={"DBMODULE_REPOSITORY__KEY": "ef" * 32})
    target = str(site.base / "restored")
    assert shell("restore", "--target", target, env=env)[0] == 0
    assert shell("verify", env=env)[1]["status"] == "sound"

    key_file.chmod(0o644)
    assert "read by others" in shell.refused("backup", "full")
    key_file.unlink()
    assert "cannot read" in shell.refused("backup", "full")
    assert "cannot read" in shell.refused("init", *new)  # makes no other key
    assert not key_file.exists()
    config.write_text(config.read_text().replace("key_file", "# key_file"))
    assert "no master key is given" in shell.refused("list")
    for secret in (first, safe, "ef" * 32):
        assert secret not in shell.printed
        assert secret not in config.read_text()


def test_keys_of_a_repository_that_is_not_encrypted(plain_site: Site, shell: Shell) -> None:
    site = plain_site
    shutil.copy(site.base / "dbmodule.toml", site.base / "cli.toml")
    code, document = shell("key", "list")
    assert (code, document["error"]["code"]) == (2, "usage")
    code, document = shell("backup", "full", env={"DBMODULE_REPOSITORY__KEY": "ef" * 32})
    assert (code, document["error"]["code"]) == (4, "refused")
    assert "not encrypted" in document["error"]["message"]


def test_nothing_but_encryption_needs_the_library_of_ciphers(plain_site: Site) -> None:
    """So that commands start quickly where nothing is encrypted."""
    script = (
        "import sys\n"
        "from dbmodule.app import App\n"
        "from dbmodule.config import load_config\n"
        "App.open(load_config()).backups()\n"
        "print([name for name in sys.modules if name.startswith('cryptography')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "DBMODULE_CONFIG": str(plain_site.base / "dbmodule.toml"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
