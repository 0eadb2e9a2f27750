"""``dbmodule release``: let go of a backup that was held."""

from __future__ import annotations

import click

from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation


@click.command("release", cls=Command)
@click.argument("backup", metavar="ID|latest")
@pass_invocation
def command(invocation: Invocation, backup: str) -> None:
    """Let go of a backup that was held: from now on the retention policy decides."""
    report = invocation.open_app().release(backup)
    invocation.report(
        as_document(report), lambda printer: printer.line(f"{report.backup_id} is held no longer.")
    )
