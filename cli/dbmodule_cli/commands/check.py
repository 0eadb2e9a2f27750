"""``dbmodule check``: is everything in place for a backup that will restore?"""

from __future__ import annotations

from collections.abc import Sequence

import click

from dbmodule.reports import Finding
from dbmodule_cli import exit_codes
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.command("check", cls=Command)
@pass_invocation
def command(invocation: Invocation) -> int:
    """Check that everything is in place for a backup that will restore.

    Looks at permissions, settings, versions, space, the repository and the agent. Exits with 0
    when there is nothing worse than a warning, with 1 when there is an error.
    """
    report = invocation.open_app().check()
    invocation.report(as_document(report), lambda printer: show_findings(printer, report.findings))
    return exit_codes.FAILED if report.status == "error" else exit_codes.DONE


def show_findings(printer: Printer, findings: Sequence[Finding]) -> None:
    """A table of findings, and below it what to do about those that are not fine."""
    if not findings:
        return
    printer.table(
        ("status", "check", "evidence"), [(f.severity, f.name, f.evidence) for f in findings]
    )
    for finding in findings:
        if finding.remedy:
            printer.line(f"{finding.name}: {finding.remedy}")
