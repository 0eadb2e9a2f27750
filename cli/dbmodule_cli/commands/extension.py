"""``dbmodule extension``: the SQL side of dbmodule in a server."""

from __future__ import annotations

from pathlib import Path

import click

from dbmodule_cli.command import Group
from dbmodule_cli.invocation import Invocation, pass_invocation
from dbmodule_cli.output import Printer


@click.group("extension", cls=Group)
def command() -> None:
    """Install the SQL functions."""


@command.command("install")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The server's extension directory; asked of the server if not given.",
)
@pass_invocation
def install(invocation: Invocation, directory: Path | None) -> None:
    """Install the extension's files, or plain SQL where they cannot be written."""
    invocation.stopped_state = "Run it again: it goes on from what was done."
    done = invocation.open_app().install_extension(directory=directory and directory.absolute())

    def show(printer: Printer) -> None:
        for line in done:
            printer.line(line)

    invocation.report({"done": done}, show)
