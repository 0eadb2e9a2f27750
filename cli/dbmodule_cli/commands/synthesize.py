"""``dbmodule synthesize``: a full backup made of a chain, inside the repository."""

from __future__ import annotations

import click

from dbmodule_cli import exit_codes
from dbmodule_cli.command import Command
from dbmodule_cli.commands.backup import show_backup
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer
from dbmodule_cli.problems import show_problems

_STOPPED = "No backup was made and earlier ones are untouched. Run the command again."


@click.command("synthesize", cls=Command)
@click.argument("backup", metavar="ID|latest")
@pass_invocation
def command(invocation: Invocation, backup: str) -> int:
    """Make a full backup of a differential or incremental and its chain.

    The new full holds the state of that backup. It is made inside the repository, by references
    alone: the server is not asked, and next to nothing is stored. Later backups build on it, and
    the old chain is no longer needed. Exits with 3 when corrupt pages are in that state.
    """
    app = invocation.open_app()
    invocation.stops_orderly(_STOPPED)
    with invocation.progress() as progress:
        report = app.synthesize(
            backup, progress=progress, cancelled=invocation.interrupts.requested
        )

    def show(printer: Printer) -> None:
        show_backup(printer, report)
        show_problems(printer, report, report.corruption)

    invocation.report(as_document(report), show)
    return exit_codes.DONE if report.status == "completed" else exit_codes.DAMAGE
