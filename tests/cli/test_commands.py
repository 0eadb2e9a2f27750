"""What each command asks of the library, answers in JSON and in text, and exits with."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dbmodule_cli.commands.list import chain_rows

from dbmodule.ident import BackupId, BackupType
from dbmodule.reports import (
    BackupDetails,
    BackupOptions,
    CheckReport,
    Finding,
    HoldReport,
    NewKey,
    RestoreOptions,
    VerifyLevel,
)
from tests.cli.conftest import Dbmodule
from tests.cli.fake_app import DAMAGED, DIFF, FULL, App, backup_report

COMMANDS = {
    "init": ["init", "--pgdata", "data", "--repo", "repo"],
    "check": ["check"],
    "backup": ["backup", "full"],
    "backups": ["list"],
    "show": ["show", DIFF],
    "restore": ["restore", "--target", "restored"],
    "verify": ["verify"],
    "synthesize": ["synthesize", DIFF],
    "expire": ["expire"],
    "hold": ["hold", FULL],
    "release": ["release", FULL],
    "keys": ["key", "list"],
    "add_key": ["key", "add", "--new-key-file", "new"],
    "rotate_key": ["key", "rotate", "--new-key-command", "pass show new"],
    "revoke_key": ["key", "revoke", "c" * 32],
    "run_agent": ["agent"],
    "install_extension": ["extension", "install"],
}


@pytest.mark.parametrize("method", COMMANDS)
def test_json_is_one_document_and_quiet_is_silent(
    dbmodule: Dbmodule, app: type[App], method: str
) -> None:
    arguments = COMMANDS[method]
    after, before = dbmodule(*arguments, "--json"), dbmodule("--json", *arguments)
    assert (after.code, after.err) == (0, "")
    assert after == before
    assert isinstance(after.document, dict)
    quiet = dbmodule(*arguments, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    text = dbmodule(*arguments)
    assert (text.code, text.err) == (0, "")
    assert text.out.endswith("\n")
    assert "\x1b" not in text.out
    assert [name for name, _ in app.calls] == [method] * 4


def test_a_reports_fields_are_the_documents_names(dbmodule: Dbmodule, app: type[App]) -> None:
    for method, arguments in COMMANDS.items():
        answer = app.answers[method]
        if dataclasses.is_dataclass(answer) and not isinstance(answer, type | BackupDetails):
            assert dbmodule(*arguments, "--json").document == dataclasses.asdict(answer)


def test_list(dbmodule: Dbmodule, app: type[App]) -> None:
    listed = dbmodule("list", "--json").document["backups"]
    assert [backup["backup_id"] for backup in listed] == [FULL, DIFF]
    assert listed[1]["baseline_id"] == FULL
    head, *rows = dbmodule("list").out.splitlines()
    assert head.split()[0] == "BACKUP"
    assert [row.split()[0] for row in rows] == [FULL, DIFF]
    app.answers["backups"] = []
    assert dbmodule("list", "--json").document == {"backups": []}
    assert "backup full" in dbmodule("list").out


def test_the_tree_of_chains() -> None:
    edges = [
        ("f1", None), ("f2", None), ("a", "f1"), ("b", "a"), ("c", "f1"), ("d", "f2"), ("x", "gone")
    ]  # fmt: skip
    backups = [
        backup_report(f"0-0-incr-{name}", base and f"0-0-incr-{base}") for name, base in edges
    ]
    assert [guide + backup.backup_id[9:] for guide, backup in chain_rows(backups)] == [
        "f1", "|- a", "|  `- b", "`- c", "f2", "`- d", "x"
    ]  # fmt: skip


def test_a_long_chain_is_listed() -> None:
    names = [f"0-0-incr-{number}" for number in range(3000)]
    backups = [
        backup_report(name, base) for name, base in zip(names, [None, *names[:-1]], strict=True)
    ]
    assert [backup.backup_id for _, backup in chain_rows(backups)] == names


def test_show(dbmodule: Dbmodule) -> None:
    document = dbmodule("show", DIFF, "--json").document
    assert document["backup_id"] == DIFF
    assert document["chain"] == [FULL, DIFF]
    assert document["corruption"][0]["path"] == "base/5/1259"
    assert "backup" not in document
    text = dbmodule("show", DIFF).out
    assert f"{FULL} <- {DIFF}" in text
    assert "/srv/fast" in text
    assert re.search(r"^public\.a_idx +public\.a +app +main +41$", text, re.MULTILINE)
    assert re.search(r"^1663/6/16385 +6 +fsm +3$", text, re.MULTILINE)


def test_show_tells_what_is_corrupt_and_what_to_do(dbmodule: Dbmodule) -> None:
    text = dbmodule("show", DIFF).out
    page = rf"^pg_catalog\.pg_class +pg_catalog\.pg_class +app +7 +{FULL} +base/5/1259 +0002, "
    assert re.search(page, text, re.MULTILINE)
    assert f"dbmodule restore {FULL} --target" in text
    assert "3 divergent pages: by their LSN older than the baseline" in text
    assert "REINDEX" not in text and "no backup here" not in text


def test_backup_options(dbmodule: Dbmodule, app: type[App]) -> None:
    dbmodule("backup", "incr")
    dbmodule(
        "backup", "diff", "--baseline", FULL, "--detect", "content", "--label", "x", "--offline"
    )
    dbmodule("backup", "full", "--spread-checkpoint")
    assert [arguments["options"] for _, arguments in app.calls] == [
        BackupOptions(BackupType.INCR),
        BackupOptions(BackupType.DIFF, "x", BackupId(FULL), "content", offline=True),
        BackupOptions(BackupType.FULL, spread_checkpoint=True),
    ]


def test_restore_options(dbmodule: Dbmodule, app: type[App], tmp_path: Path) -> None:
    dbmodule("restore", "--target", "t")
    dbmodule(
        "restore", FULL, "--target", "/t", "--tablespace-map", "/a=/b", "--tablespace-map",
        r"/c\=d=/e\=f",
    )  # fmt: skip
    assert [arguments["options"] for _, arguments in app.calls] == [
        RestoreOptions(tmp_path / "t", "latest", {}),
        RestoreOptions(Path("/t"), FULL, {"/a": Path("/b"), "/c=d": Path("/e=f")}),
    ]


def test_verify_options(dbmodule: Dbmodule, app: type[App]) -> None:
    for arguments in ([], ["--all"], [FULL]):
        assert dbmodule("verify", *arguments).code == 0
    assert [arguments["backup"] for _, arguments in app.calls] == [None, None, FULL]
    assert "PAGES" not in dbmodule("verify").out.upper()
    app.answers["verify"] = dataclasses.replace(
        app.answers["verify"], level=VerifyLevel.FULL, pages_checked=7, pages_known_corrupt=2
    )
    assert "7 checked, of which 2" in dbmodule("verify", "--level", "full").out
    levels = [arguments["level"] for _, arguments in app.calls]
    assert levels == [VerifyLevel.NORMAL] * 4 + [VerifyLevel.FULL]


def test_expire_shows_what_becomes_of_each_backup_and_why(
    dbmodule: Dbmodule, app: type[App]
) -> None:
    text = dbmodule("expire").out
    assert re.search(rf"^{FULL} +removed +no rule keeps it$", text, re.MULTILINE)
    assert re.search(rf"^{DIFF} +keep +keep_last = 1; held until 2027$", text, re.MULTILINE)
    assert "1 backups were removed. 1.0 MB are no longer needed" in text
    report = app.answers["expire"]
    app.answers["expire"] = dataclasses.replace(report, dry_run=True)
    text = dbmodule("expire", "--dry-run").out
    assert re.search(rf"^{FULL} +remove +no rule", text, re.MULTILINE)
    assert "Nothing was removed" in text
    assert [arguments["dry_run"] for _, arguments in app.calls] == [False, True]
    app.answers["expire"] = dataclasses.replace(
        report, policy={}, decisions=[], removal=None, hint="Set [retention]."
    )
    assert "no backup is removed. Set [retention]." in dbmodule("expire").out
    postponed = dataclasses.replace(report.removal, removed=[], postponed="a backup runs")
    app.answers["expire"] = dataclasses.replace(report, removal=postponed)
    text = dbmodule("expire").out
    assert "Nothing was removed: a backup runs." in text
    assert re.search(rf"^{FULL} +remove +no rule", text, re.MULTILINE)


def test_hold_and_release(dbmodule: Dbmodule, app: type[App]) -> None:
    assert f"{FULL} is held until it is released." in dbmodule("hold", FULL).out
    app.answers["hold"] = HoldReport(FULL, "2027-01-01T00:00:00+00:00")
    assert "until 2027-01-01T" in dbmodule("hold", "latest", "--keep-until", "2026-12-31").out
    assert "no longer" in dbmodule("release", FULL).out
    assert [arguments for _, arguments in app.calls] == [
        {"backup": FULL, "keep_until": None},
        {"backup": "latest", "keep_until": "2026-12-31"},
        {"backup": FULL},
    ]


def test_holds_are_shown(dbmodule: Dbmodule, app: type[App]) -> None:
    assert "HELD" not in dbmodule("list").out
    app.answers["backups"] = [backup_report(hold="forever"), backup_report(DIFF, FULL)]
    head, *rows = dbmodule("list").out.splitlines()
    assert head.endswith("HELD UNTIL")
    assert [row.endswith("forever") for row in rows] == [True, False]
    details = app.answers["show"]
    assert "held until" not in dbmodule("show", DIFF).out
    held = dataclasses.replace(details.backup, hold="2027-01-01T00:00:00+00:00")
    app.answers["show"] = dataclasses.replace(details, backup=held)
    assert re.search("^held until: +2027-01-01T", dbmodule("show", DIFF).out, re.MULTILINE)


def test_init(dbmodule: Dbmodule, app: type[App], tmp_path: Path) -> None:
    new = tmp_path / "new.toml"
    result = dbmodule(
        "init", "--pgdata", "data", "--repo", "repo", "--dsn", "port=1", "--cluster", "c",
        "--config", str(new), "--no-extension",
    )  # fmt: skip
    assert result.code == 0
    assert app.calls == [("init", {"config_path": new, "extension": False})]
    assert app.config is not None
    assert app.config.server.pgdata == tmp_path / "data"
    assert app.config.server.dsn == "port=1"
    assert app.config.repository.url == str(tmp_path / "repo")
    assert app.config.repository.cluster == "c"
    assert "next: dbmodule backup full" in result.out
    assert "agent: Start `dbmodule agent`." in result.out


def test_init_again_keeps_what_is_configured(
    dbmodule: Dbmodule, app: type[App], tmp_path: Path
) -> None:
    assert dbmodule("init").code == 0
    assert app.calls == [("init", {"config_path": tmp_path / "dbmodule.toml", "extension": True})]
    assert app.config is not None
    assert app.config.repository.url == "/backups"


def test_a_global_option_after_the_command_wins(dbmodule: Dbmodule, app: type[App]) -> None:
    assert dbmodule("--cluster", "one", "--repo", "/r", "check", "--cluster", "two").code == 0
    assert app.config is not None
    assert (app.config.repository.cluster, app.config.repository.url) == ("two", "/r")


def test_extension_install(dbmodule: Dbmodule, app: type[App], tmp_path: Path) -> None:
    result = dbmodule("extension", "install", "--directory", "ext", "--json")
    assert result.document == {"done": ["copied dbmodule.control", "created the extension"]}
    assert app.calls == [("install_extension", {"directory": tmp_path / "ext"})]


def test_keys(dbmodule: Dbmodule, app: type[App], tmp_path: Path) -> None:
    listed = dbmodule("key", "list", "--json").document["keys"]
    assert [key["label"] for key in listed] == ["", "in the safe"]
    assert "in the safe" in dbmodule("key", "list").out
    app.calls.clear()
    assert dbmodule("key", "add", "--new-key-file", "new", "--label", "x").code == 0
    rotated = dbmodule("key", "rotate", "--new-key-command", "pass show new")
    assert "configure the new key" in rotated.out
    dbmodule("key", "revoke", "c" * 32)
    assert app.calls == [
        ("add_key", {"source": NewKey(tmp_path / "new"), "label": "x"}),
        ("rotate_key", {"source": NewKey(command="pass show new"), "label": ""}),
        ("revoke_key", {"key_id": "c" * 32}),
    ]


def test_init_with_a_key_file(dbmodule: Dbmodule, app: type[App], tmp_path: Path) -> None:
    assert dbmodule("init", "--key-file", "master.key").code == 0
    assert app.config is not None
    assert app.config.repository.key_file == tmp_path / "master.key"


@pytest.mark.parametrize(
    ("method", "arguments", "answer"),
    [
        ("backup", ["backup", "full"], backup_report(status="completed_with_corruption")),
        ("verify", ["verify"], DAMAGED),
    ],
)
def test_damage_is_an_answer_with_exit_code_3(
    dbmodule: Dbmodule, app: type[App], method: str, arguments: list[str], answer: Any
) -> None:
    app.answers[method] = answer
    result = dbmodule(*arguments, "--json")
    assert result.code == 3
    assert result.document == dataclasses.asdict(answer)
    assert answer.status in dbmodule(*arguments).out


@pytest.mark.parametrize(("severity", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_check_fails_on_errors_only(
    dbmodule: Dbmodule, app: type[App], severity: str, code: int
) -> None:
    app.answers["check"] = CheckReport(severity, [Finding("wal", severity, "seen", "do this")])
    result = dbmodule("check")
    assert result.code == code
    assert "wal: do this" in result.out


@pytest.mark.parametrize("ok", [True, False])
def test_demo(
    dbmodule: Dbmodule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ok: bool
) -> None:
    asked = []

    def run_demo(scale: int, keep: Path | None, progress: Any) -> Any:
        asked.append((scale, keep))
        return SimpleNamespace(
            ok=ok,
            as_dict=lambda: {"ok": ok},
            columns=("step", "took"),
            rows=[("full", "1 s"), ("diff", "0.1 s")],
        )

    module = SimpleNamespace(run_demo=run_demo)
    monkeypatch.setitem(sys.modules, "dbmodule.demo", module)
    result = dbmodule("demo", "--scale", "3", "--keep", "here", "--json")
    assert (result.code, result.document) == (0 if ok else 1, {"ok": ok})
    text = dbmodule("demo").out.splitlines()
    assert text[:2] == ["STEP  TOOK", "full  1 s"]
    assert asked == [(3, tmp_path / "here"), (10, None)]


def test_text_from_elsewhere_cannot_drive_the_terminal(dbmodule: Dbmodule, app: type[App]) -> None:
    app.answers["backups"] = [backup_report(label="\x1b[2J\nevil\udcff")]
    assert r"\x1b[2J\nevil\udcff" in dbmodule("list").out
