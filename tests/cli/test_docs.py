"""``docs/cli.md`` has every command, option, exit code and field of the reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from dbmodule_cli.exit_codes import EXIT_CODES
from dbmodule_cli.main import cli

from dbmodule import errors, reports

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", found) for below, found in command.commands.items())
        else:
            yield name, command


COMMANDS = dict(_commands())


def _section(title: str) -> str:
    found = [part for part in PAGE.split("\n## ") if part.startswith(title)]
    assert len(found) == 1, f"sections that start with {title!r}: {len(found)}"
    return found[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    own = _section(f"`dbmodule {name}")
    common = _section("Options of every command")
    for parameter in COMMANDS[name].params:
        if not isinstance(parameter, click.Option):
            continue
        for option in parameter.opts + parameter.secondary_opts:
            where = own if parameter.expose_value else common
            assert f"`{option}" in where, option


def test_every_documented_command_exists() -> None:
    documented = [
        part.split("`")[1] for part in PAGE.split("\n## ") if part.startswith("`dbmodule ")
    ]
    names = [" ".join(word for word in title.split()[1:] if word.isalpha() and word.islower())
             for title in documented]  # fmt: skip
    assert names == list(COMMANDS)


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = [line.strip("| ").split(" | ") for line in _section("Exit codes").splitlines()]
    assert {int(row[0]): row[1] for row in rows if row[0].isdigit()} == EXIT_CODES


def test_every_error_code_is_documented() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        assert issubclass(kind, errors.DbmoduleError)
        assert f"`{kind.code}`" in _section("Output")


def test_the_error_document_is_json() -> None:
    text = PAGE.split("```json\n")[1].split("```")[0]
    assert set(json.loads(text)["error"]) == {"code", "message", "hint"}


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("init", reports.InitReport),
        ("check", reports.CheckReport),
        ("check", reports.Finding),
        ("backup", reports.BackupReport),
        ("restore", reports.RestoreReport),
        ("verify", reports.VerifyReport),
        ("expire", reports.RetentionReport),
        ("expire", reports.RetentionDecision),
        ("expire", reports.ExpireReport),
        ("hold", reports.HoldReport),
        ("release", reports.ReleaseReport),
        ("verify", reports.Damage),
    ],
)
def test_every_field_of_a_report_is_documented(name: str, report: type[Any]) -> None:
    section = _section(f"`dbmodule {name}")
    for field in dataclasses.fields(report):
        assert f"`{field.name}`" in section, field.name


def test_the_fields_of_show_are_documented() -> None:
    for field in dataclasses.fields(reports.BackupDetails):
        assert field.name == "backup" or f"`{field.name}`" in _section("`dbmodule show")
