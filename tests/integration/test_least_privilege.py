"""Backups by a role that is no superuser: what it needs, and what `check` says of what it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dbmodule.app import App
from dbmodule.errors import ServerError
from dbmodule.ident import BackupType
from dbmodule.reports import BackupOptions
from tests import oracles
from tests.fix_backup import Site, SiteFactory

ROOT = Path(__file__).parents[2]
NAME = "back-up O'Rourke"
ROLE = f'"{NAME}"'
GRANTS = {
    f"GRANT pg_monitor TO {ROLE};": f"REVOKE pg_monitor FROM {ROLE}",
    f"ALTER ROLE {ROLE} REPLICATION;": f"ALTER ROLE {ROLE} NOREPLICATION",
    f"GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean) TO {ROLE};": (
        f"REVOKE EXECUTE ON FUNCTION pg_backup_start FROM {ROLE}"
    ),
    f"GRANT EXECUTE ON FUNCTION pg_backup_stop(boolean) TO {ROLE};": (
        f"REVOKE EXECUTE ON FUNCTION pg_backup_stop FROM {ROLE}"
    ),
    f"GRANT dbmodule_agent TO {ROLE};": f"REVOKE dbmodule_agent FROM {ROLE}",
}
"""The SQL that gives each privilege → the SQL that takes it away."""


@dataclass(frozen=True, slots=True)
class Operator:
    """The library as a role of few privileges uses it, and what the superuser sees."""

    site: Site
    app: App

    def remedies(self) -> list[str]:
        return [f.remedy for f in self.app.check().findings if f.severity == "error"]

    def backup(self, kind: BackupType) -> str:
        return self.app.backup(BackupOptions(kind)).backup_id

    def leftovers(self) -> list[tuple[object, ...]]:
        """Slots, locks and sessions that a failed backup should have taken with it."""
        return self.site.cluster.query(
            "SELECT slot_name::text FROM pg_replication_slots"
            " UNION ALL SELECT 'lock' FROM pg_locks WHERE locktype = 'advisory'"
        )


@pytest.fixture
def operator(make_site: SiteFactory, pg_major: int) -> Operator:
    site = make_site(pg_major)
    site.cluster.execute(f"CREATE ROLE {ROLE} LOGIN")
    return Operator(site, site.app_with(dsn=site.cluster.dsn(user=NAME), pgdata=None))


def test_check_names_what_a_new_role_lacks_and_no_more(operator: Operator) -> None:
    assert operator.remedies() == list(GRANTS)
    for statement in operator.remedies():
        operator.site.cluster.execute(statement)
    assert operator.remedies() == []
    operator.site.cluster.execute("CREATE TABLE kept AS SELECT generate_series(1, 5000) AS i")
    ids = [operator.backup(kind) for kind in BackupType]
    operator.site.cluster.execute("UPDATE kept SET i = -i WHERE i % 100 = 0")
    ids.append(operator.backup(BackupType.INCR))
    reports = {r.backup_id: r for r in operator.site.app.backups()}
    assert [reports[i].detector for i in ids] == ["full", "scan", "scan", "scan"]
    recorded = operator.site.cluster.query("SELECT backup_id FROM dbmodule.backup ORDER BY 1")
    assert sorted(ids) == [backup for (backup,) in recorded]
    copy = operator.site.start_copy(ids[-1])
    assert oracles.digests(copy) == oracles.digests(operator.site.cluster)


def test_each_missing_privilege_fails_the_backup_clearly_and_is_mended(
    operator: Operator,
) -> None:
    cluster = operator.site.cluster
    for grant in GRANTS:
        cluster.execute(grant)
    for grant, revoke in GRANTS.items():
        cluster.execute(revoke)
        assert operator.remedies() == [grant]
        with pytest.raises(ServerError) as failure:
            operator.backup(BackupType.FULL)
        assert failure.value.exit_code == 6
        assert re.search("permission denied|must be superuser", failure.value.message)
        assert "dbmodule check" in failure.value.hint
        assert operator.leftovers() == []
        assert operator.site.app.backups() == []
        for remedy in operator.remedies():
            cluster.execute(remedy)
        assert operator.remedies() == []
    operator.backup(BackupType.FULL)


def test_the_command_line_tells_a_missing_privilege(make_site: SiteFactory, tmp_path: Path) -> None:
    site = make_site()
    grant, revoke = next(iter(GRANTS.items()))
    site.cluster.execute(f"CREATE ROLE {ROLE} LOGIN")
    for statement in [*GRANTS, revoke]:
        site.cluster.execute(statement)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}",
        "DBMODULE_SERVER__DSN": site.cluster.dsn(user=NAME),
        "DBMODULE_REPOSITORY__URL": str(site.repository_path),
    }

    def dbmodule(*arguments: str) -> tuple[int, dict[str, object]]:
        command = [sys.executable, "-c", "from dbmodule_cli.main import main; main()"]
        done = subprocess.run(
            [*command, *arguments, "--json"],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        return done.returncode, json.loads(done.stdout)

    code, failed = dbmodule("backup", "full")
    assert code == 6
    assert "permission denied" in str(failed["error"])
    code, checked = dbmodule("check")
    assert code == 1
    assert grant in json.dumps(checked, ensure_ascii=False).replace('\\"', '"')
    site.cluster.execute(grant)
    assert dbmodule("check")[0] == 0
    code, report = dbmodule("backup", "full")
    assert (code, report["status"]) == (0, "completed")
