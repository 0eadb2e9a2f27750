"""Runs command lines in this process, against the fake library."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dbmodule_cli.main import run

from tests.cli import fake_app


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)


Dbmodule = Callable[..., Result]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[fake_app.App]:
    """The fake library, and a directory with a configuration for it."""
    for name in [name for name in os.environ if name.upper().startswith("DBMODULE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(fake_app.App, "answers", fake_app.default_answers())
    monkeypatch.setattr(fake_app.App, "calls", [])
    monkeypatch.setitem(sys.modules, "dbmodule.app", fake_app)
    monkeypatch.chdir(tmp_path)
    Path("dbmodule.toml").write_text('[repository]\nurl = "/backups"\n')
    monkeypatch.setenv("DBMODULE_CONFIG", str(tmp_path / "dbmodule.toml"))
    return fake_app.App


@pytest.fixture
def dbmodule(app: type[fake_app.App], capsys: pytest.CaptureFixture[str]) -> Dbmodule:
    """``dbmodule("list", "--json")`` → exit code and output."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = run(arguments)
        return Result(code, *capsys.readouterr())

    return call
