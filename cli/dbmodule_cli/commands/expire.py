"""``dbmodule expire``: remove the backups that the retention policy does not keep."""

from __future__ import annotations

from collections.abc import Collection

import click

from dbmodule.reports import RetentionDecision, RetentionReport
from dbmodule_cli import humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.command("expire", cls=Command)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@pass_invocation
def command(invocation: Invocation, dry_run: bool) -> None:
    """Remove the backups that the policy in [retention] does not keep.

    Says of every backup what becomes of it and why. What a kept backup is built on is kept, and so
    are held backups and the newest one. Without a policy no backup is removed.
    """
    app = invocation.open_app()
    if not dry_run:
        invocation.stops_orderly(
            "What was removed is gone; every backup that is left is whole. Run the command again."
        )
    with invocation.progress() as progress:
        report = app.expire(
            dry_run=dry_run, progress=progress, cancelled=invocation.interrupts.requested
        )
    invocation.report(as_document(report), lambda printer: _show(printer, report))


def _decision(decision: RetentionDecision, gone: Collection[str]) -> str:
    if decision.keep:
        return "keep"
    return "removed" if decision.backup_id in gone else "remove"


def _show(printer: Printer, report: RetentionReport) -> None:
    if report.decisions:
        gone = [] if report.removal is None or report.dry_run else report.removal.removed
        printer.table(
            ("backup", "decision", "why"),
            [(d.backup_id, _decision(d, gone), "; ".join(d.reasons)) for d in report.decisions],
        )
    else:
        printer.line("no backups yet; take one with: dbmodule backup full")
    if report.hint:
        printer.line(f"No retention policy is configured: no backup is removed. {report.hint}")
    removal = report.removal
    if removal is None:
        return
    if removal.postponed:
        printer.line(f"Nothing was removed: {removal.postponed}.")
    elif report.dry_run:
        printer.line(
            f"Nothing was removed: without --dry-run {len(removal.removed)} backups would be, and"
            f" {humane.size(removal.bytes_condemned)} would no longer be needed."
        )
    else:
        printer.line(
            f"{len(removal.removed)} backups were removed. {humane.size(removal.bytes_condemned)}"
            " are no longer needed, and a later expire frees them;"
            f" {humane.size(removal.bytes_removed)} were freed now."
        )
