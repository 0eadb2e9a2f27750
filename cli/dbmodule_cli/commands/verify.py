"""``dbmodule verify``: are the stored bytes those that were written?"""

from __future__ import annotations

import click

from dbmodule.reports import VerifyReport
from dbmodule_cli import exit_codes, humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.command("verify", cls=Command)
@click.argument("backup", metavar="[ID|latest]", required=False)
@click.option("--all", "all_", is_flag=True, help="Verify every backup; this is the default.")
@pass_invocation
def command(invocation: Invocation, backup: str | None, all_: bool) -> int:
    """Read what is stored and compare it with its hashes.

    Verifies one backup with its chain, or all. Exits with 3 when there is damage.
    """
    if backup is not None and all_:
        raise click.UsageError("give a backup or --all, not both")
    app = invocation.open_app()
    invocation.stops_orderly("Nothing was changed, and what was not read is not verified.")
    with invocation.progress() as progress:
        report = app.verify(backup, progress=progress, cancelled=invocation.interrupts.requested)
    invocation.report(as_document(report), lambda printer: _show(printer, report))
    return exit_codes.DONE if report.status == "sound" else exit_codes.DAMAGE


def _show(printer: Printer, report: VerifyReport) -> None:
    printer.fields(
        [
            ("status", report.status),
            ("backups", str(len(report.backups))),
            ("read", f"{report.objects_checked} objects, {humane.size(report.bytes_read)}"),
            ("took", humane.span(report.seconds)),
        ]
    )
    if report.damage:
        printer.table(
            ("damaged object", "problem"),
            [(damage.object, damage.problem) for damage in report.damage],
        )
