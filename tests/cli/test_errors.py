"""Every way to fail: the exit code, the JSON document, and what a person reads."""

from __future__ import annotations

import importlib
import logging

import pytest
from dbmodule_cli.exit_codes import EXIT_CODES

from dbmodule import errors
from tests.cli.conftest import Dbmodule
from tests.cli.fake_app import FULL, App

ERROR_CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.DbmoduleError)
]


@pytest.mark.parametrize("kind", ERROR_CLASSES)
def test_an_error_of_the_library(
    dbmodule: Dbmodule, app: type[App], kind: type[errors.DbmoduleError]
) -> None:
    app.answers["check"] = kind("it failed", hint="Do this.")
    result = dbmodule("check", "--json")
    assert result.code == kind.exit_code
    assert result.code in EXIT_CODES
    assert result.document == {
        "error": {"code": kind.code, "message": "it failed", "hint": "Do this."}
    }
    text = dbmodule("check")
    assert (text.code, text.out) == (kind.exit_code, "")
    assert text.err == "error: it failed\nhint: Do this.\n"
    assert dbmodule("check", "--quiet").err == text.err


def test_an_error_without_a_hint(dbmodule: Dbmodule, app: type[App]) -> None:
    app.answers["check"] = errors.ServerError("gone")
    assert dbmodule("check").err == "error: gone\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no such command"),
        (["list", "--nonsense"], "no such option"),
        (["backup"], "missing argument"),
        (["backup", "huge"], "'huge'"),
        (["backup", "full", "--baseline", FULL], "leave out --baseline"),
        (["backup", "full", "--offline", "--spread-checkpoint"], "running server"),
        (["backup", "diff", "--baseline", "x"], "not a backup id"),
        (["restore"], "missing option '--target'"),
        (["restore", "--target", "t", "--tablespace-map", "/a"], "not OLD=NEW"),
        (["restore", "--target", "t", "--tablespace-map", "a=/b"], "absolute"),
        (
            ["restore", "--target", "t", "--tablespace-map", "/a=/b", "--tablespace-map", "/a=/c"],
            "mapped twice",
        ),
        (["verify", FULL, "--all"], "not both"),
        (["extension"], "missing command"),
        (["demo", "--scale", "0"], "scale"),
        (["check", "--config", "missing.toml"], "missing.toml"),
        (["check", "--cluster", "a/b"], "repository.cluster"),
    ],
)
def test_a_usage_error(
    dbmodule: Dbmodule, app: type[App], arguments: list[str], message: str
) -> None:
    for line in (["--json", *arguments], [*arguments, "--json"]):
        result = dbmodule(*line)
        assert result.code == 2
        assert result.document["error"]["code"] == "usage"
        assert message in result.document["error"]["message"]
        assert result.document["error"]["hint"]
    text = dbmodule(*arguments)
    assert (text.code, text.out) == (2, "")
    assert message in text.err
    assert app.calls == []


def test_an_unexpected_error_shows_its_traceback_only_on_request(
    dbmodule: Dbmodule, app: type[App]
) -> None:
    app.answers["check"] = KeyError("surprise")
    result = dbmodule("check", "--json")
    assert (result.code, result.err) == (1, "")
    assert result.document["error"]["code"] == "unexpected"
    assert result.document["error"]["message"] == "KeyError: 'surprise'"
    debugged = dbmodule("check", "--json", "--debug")
    assert debugged.document == result.document
    assert "Traceback" in debugged.err


def test_logs_go_to_standard_error(
    dbmodule: Dbmodule, app: type[App], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: App) -> object:
        logging.getLogger("dbmodule.something").warning("look out")
        logging.getLogger("dbmodule.something").debug("detail")
        return self.answers["check"]

    monkeypatch.setattr(app, "check", check)
    result = dbmodule("check", "--json")
    assert result.document["status"] == "ok"
    assert result.err == "WARNING dbmodule.something: look out\n"
    assert "detail" in dbmodule("check", "--debug").err
    assert dbmodule("check", "--quiet").err == ""


def test_every_help_has_the_exit_codes(dbmodule: Dbmodule) -> None:
    main = importlib.import_module("dbmodule_cli.main")
    for name in ["", *main.cli.list_commands(None), "extension install"]:
        result = dbmodule(*name.split(), "--help")
        assert result.code == 0
        for code, meaning in EXIT_CODES.items():
            assert f"{code:>3}  {meaning}\n" in result.out, name
    assert dbmodule().out == dbmodule("--help").out
