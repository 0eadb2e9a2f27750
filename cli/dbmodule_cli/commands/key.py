"""``dbmodule key``: the master keys of an encrypted repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dbmodule.reports import KeyInfo, NewKey
from dbmodule_cli.command import Group
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.group("key", cls=Group)
def command() -> None:
    """Add, replace, revoke and list the master keys of an encrypted repository."""


def _new_key(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where a further master key comes from; never on the command line."""
    for option in (
        click.option("--label", default="", help="A note that is kept with the key, encrypted."),
        click.option(
            "--new-key-command", metavar="COMMAND", default="", help="Command that prints it."
        ),
        click.option(
            "--new-key-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="File that holds the new master key; made if there is none.",
        ),
    ):
        function = option(function)
    return function


@command.command("add")
@_new_key
@pass_invocation
def add(
    invocation: Invocation, new_key_file: Path | None, new_key_command: str, label: str
) -> None:
    """Let one more master key open the repository; no data is written again."""
    invocation.stopped_state = "Run it again: a key that was added already stays as it is."
    source = NewKey(new_key_file and new_key_file.absolute(), new_key_command)
    added = invocation.open_app().add_key(source, label=label)
    invocation.report(as_document(added), lambda printer: _show(printer, [added]))


@command.command("rotate")
@_new_key
@pass_invocation
def rotate(
    invocation: Invocation, new_key_file: Path | None, new_key_command: str, label: str
) -> None:
    """Put a new master key in the place of the configured one, which is revoked.

    The new key has to be configured then, everywhere: the old one opens nothing any more. To change
    without a gap, add a key, configure it, and revoke the old one with it.
    """
    invocation.stopped_state = (
        "Either both keys open the repository, or only the new one: see `dbmodule key list`."
    )
    source = NewKey(new_key_file and new_key_file.absolute(), new_key_command)
    done = invocation.open_app().rotate_key(source, label=label)

    def show(printer: Printer) -> None:
        _show(printer, [done.added])
        printer.line(f"{done.revoked} was revoked: now configure the new key")

    invocation.report(as_document(done), show)


@command.command("revoke")
@click.argument("key_id", metavar="KEY_ID")
@pass_invocation
def revoke(invocation: Invocation, key_id: str) -> None:
    """Keep a master key from opening the repository; never the configured one."""
    invocation.open_app().revoke_key(key_id)
    invocation.report({"revoked": key_id}, lambda printer: printer.line(f"{key_id} was revoked"))


@command.command("list")
@pass_invocation
def list_(invocation: Invocation) -> None:
    """List the master keys by their ids; the keys themselves are nowhere."""
    keys = invocation.open_app().keys()
    invocation.report(
        {"keys": [as_document(key) for key in keys]}, lambda printer: _show(printer, keys)
    )


def _show(printer: Printer, keys: list[KeyInfo]) -> None:
    printer.table(
        ("key", "kind", "created", "label", "in use"),
        [
            (k.key_id, k.kind, k.created_at, k.problem or k.label, "yes" if k.current else "")
            for k in keys
        ],
    )
