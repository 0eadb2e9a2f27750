"""Stands in for `dbmodule.app` where only the command line is under test: answers what it is told.

``answers`` maps a method's name to what it returns or raises; ``calls`` is what it was asked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from dbmodule.config import Config
from dbmodule.reports import (
    BackupDetails,
    BackupReport,
    CheckReport,
    CorruptPage,
    Damage,
    ExpireReport,
    Finding,
    HoldReport,
    InitReport,
    KeyInfo,
    KeyRotation,
    RelationChange,
    ReleaseReport,
    RestoreReport,
    RetentionDecision,
    RetentionReport,
    VerifyReport,
)

FULL = "20260131-235959-full-1a2b3c"
DIFF = "20260201-235959-diff-4d5e6f"


def backup_report(backup_id: str = FULL, baseline: str | None = None, **more: Any) -> BackupReport:
    values: dict[str, Any] = {
        "backup_id": backup_id,
        "type": backup_id.split("-")[2],
        "baseline_id": baseline,
        "status": "completed",
        "label": "",
        "cluster": "main",
        "system_identifier": "7412345678901234567",
        "server_version": "18.6",
        "timeline": 1,
        "start_lsn": "0/3000028",
        "stop_lsn": "0/3000158",
        "detector": "scan",
        "detector_reason": "the baseline is a proven ancestor",
        "files_total": 1000,
        "files_read": 20,
        "files_skipped": 980,
        "pages_total": 123456,
        "pages_changed": 77,
        "pages_stored": 76,
        "bytes_total": 1 << 30,
        "bytes_read": 1 << 24,
        "bytes_changed": 77 * 8192,
        "bytes_stored": 200_000,
        "wal_bytes": 16 << 20,
        "pages_verified": 77,
        "corrupt_pages": 0,
        "divergent_pages": 0,
        "hint_pages": 0,
        "started_at": "2026-01-31T23:59:59+00:00",
        "finished_at": "2026-02-01T00:00:05+00:00",
        "seconds": 6.25,
        "phases": {"start": 0.25, "copy": 5.5, "commit": 0.5},
    }
    return BackupReport(**(values | more))


def default_answers() -> dict[str, Any]:
    full, diff = backup_report(), backup_report(DIFF, FULL)
    return {
        "init": InitReport(
            config="/etc/dbmodule/dbmodule.toml",
            repository="file:///backups",
            repository_id="5e1f",
            repository_created=True,
            encrypted=False,
            cluster="main",
            system_identifier="7412345678901234567",
            server_version="18.6",
            extension="created",
            findings=[Finding("agent", "warning", "does not run", "Start `dbmodule agent`.")],
            next_command="dbmodule backup full",
        ),
        "check": CheckReport("ok", [Finding("server", "ok", "PostgreSQL 18.6")]),
        "backup": full,
        "backups": [full, diff],
        "show": BackupDetails(
            backup=backup_report(
                DIFF, FULL, status="completed_with_corruption", corrupt_pages=1, divergent_pages=3
            ),
            chain=[FULL, DIFF],
            dependents=[],
            corruption=[
                CorruptPage(
                    path="base/5/1259",
                    block=7,
                    lsn="0/1",
                    expected=1,
                    actual=2,
                    tablespace=1663,
                    database=5,
                    relfilenode=1259,
                    fork="main",
                    database_name="app",
                    relation_name="pg_catalog.pg_class",
                    table_name="pg_catalog.pg_class",
                    last_good=FULL,
                )
            ],
            tablespaces={"16384": "/srv/fast"},
            manifest_hash="ab" * 32,
            relations=[
                RelationChange(1663, 5, 16384, "main", 41, "app", "public.a_idx", "public.a"),
                RelationChange(1663, 6, 16385, "fsm", 3),
            ],
        ),
        "restore": RestoreReport(
            backup_id=DIFF,
            chain=[FULL, DIFF],
            target="/restored",
            files=1000,
            bytes_written=1 << 30,
            pages_from={FULL: 100, DIFF: 77},
            seconds=3.5,
            phases={"plan": 0.5, "write": 3.0},
        ),
        "verify": VerifyReport("sound", [FULL], 12, 1 << 20, [], 0.5),
        "synthesize": backup_report(detector="synthetic", detector_reason="made of a chain"),
        "expire": RetentionReport(
            dry_run=False,
            policy={"keep_last": 1},
            decisions=[
                RetentionDecision(FULL, False, ["no rule keeps it"], "2026-02-01T00:00:05+00:00"),
                RetentionDecision(DIFF, True, ["keep_last = 1", "held until 2027"], None),
            ],
            removal=ExpireReport(
                removed=[FULL],
                spared=[],
                postponed="",
                packs_condemned=3,
                bytes_condemned=1 << 20,
                packs_removed=0,
                bytes_removed=0,
                packs_rewritten=0,
                bytes_rewritten=0,
                dry_run=False,
                seconds=0.5,
            ),
            hint="",
        ),
        "hold": HoldReport(FULL, "forever"),
        "release": ReleaseReport(FULL, 1),
        "keys": [KEY, replace(KEY, key_id="e" * 32, current=False, label="in the safe")],
        "add_key": replace(KEY, current=False),
        "rotate_key": KeyRotation(KEY, "d" * 32),
        "revoke_key": None,
        "run_agent": None,
        "install_extension": ["copied dbmodule.control", "created the extension"],
    }


KEY = KeyInfo("c" * 32, "key", "", "2026-01-31T23:59:59+00:00", current=True)
DAMAGED = VerifyReport("damaged", [FULL], 12, 1, [Damage("packs/1", "hash differs")], 0.5)


class App:
    answers: ClassVar[dict[str, Any]] = default_answers()
    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    config: ClassVar[Config | None] = None

    @classmethod
    def open(cls, config: Config) -> Self:
        cls.config = config
        return cls()

    def _answer(self, method: str, **arguments: Any) -> Any:
        self.calls.append((method, arguments))
        answer = self.answers[method]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def init(self, *, config_path: Path, extension: bool) -> Any:
        return self._answer("init", config_path=config_path, extension=extension)

    def check(self) -> Any:
        return self._answer("check")

    def backup(self, options: Any, *, progress: Any, cancelled: Any) -> Any:
        progress("copy", 1, 2)
        return self._answer("backup", options=options, cancelled=cancelled())

    def backups(self) -> Any:
        return self._answer("backups")

    def show(self, backup: str) -> Any:
        return self._answer("show", backup=backup)

    def restore(self, options: Any, *, progress: Any, cancelled: Any) -> Any:
        return self._answer("restore", options=options)

    def verify(self, backup: str | None, *, level: Any, progress: Any, cancelled: Any) -> Any:
        return self._answer("verify", backup=backup, level=level)

    def synthesize(self, backup: str, *, progress: Any, cancelled: Any) -> Any:
        progress("fold", 1, 2)
        return self._answer("synthesize", backup=backup)

    def expire(self, *, dry_run: bool, progress: Any, cancelled: Any) -> Any:
        progress("remove", 1, 2)
        return self._answer("expire", dry_run=dry_run)

    def hold(self, backup: str, *, keep_until: str | None) -> Any:
        return self._answer("hold", backup=backup, keep_until=keep_until)

    def release(self, backup: str) -> Any:
        return self._answer("release", backup=backup)

    def keys(self) -> Any:
        return self._answer("keys")

    def add_key(self, source: Any, *, label: str) -> Any:
        return self._answer("add_key", source=source, label=label)

    def rotate_key(self, source: Any, *, label: str) -> Any:
        return self._answer("rotate_key", source=source, label=label)

    def revoke_key(self, key_id: str) -> Any:
        return self._answer("revoke_key", key_id=key_id)

    def run_agent(self, *, stop: Any) -> Any:
        return self._answer("run_agent", stop=stop)

    def install_extension(self, *, directory: Path | None) -> Any:
        return self._answer("install_extension", directory=directory)
