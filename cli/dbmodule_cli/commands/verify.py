"""``dbmodule verify``: are the stored bytes those that were written, and the pages right?"""

from __future__ import annotations

import click

from dbmodule.reports import VerifyLevel, VerifyReport
from dbmodule_cli import exit_codes, humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.command("verify", cls=Command)
@click.argument("backup", metavar="[ID|latest]", required=False)
@click.option("--all", "all_", is_flag=True, help="Verify every backup; this is the default.")
@click.option(
    "--level",
    type=click.Choice([level.value for level in VerifyLevel]),
    default=VerifyLevel.NORMAL.value,
    show_default=True,
    help="Sizes of what is there; or the hash of every stored byte; or the checksum of every page "
    "as well.",
)
@pass_invocation
def command(invocation: Invocation, backup: str | None, all_: bool, level: str) -> int:
    """Read what is stored and compare it with its hashes.

    Verifies one backup with its chain, or all. Exits with 3 when there is damage.
    """
    if backup is not None and all_:
        raise click.UsageError("give a backup or --all, not both")
    app = invocation.open_app()
    invocation.stops_orderly("Nothing was changed, and what was not read is not verified.")
    with invocation.progress() as progress:
        report = app.verify(
            backup,
            level=VerifyLevel(level),
            progress=progress,
            cancelled=invocation.interrupts.requested,
        )
    invocation.report(as_document(report), lambda printer: _show(printer, report))
    return exit_codes.DONE if report.status == "sound" else exit_codes.DAMAGE


def _show(printer: Printer, report: VerifyReport) -> None:
    printer.fields(
        [
            ("status", f"{report.status} ({report.level})"),
            ("backups", str(len(report.backups))),
            ("read", f"{report.objects_checked} objects, {humane.size(report.bytes_read)}"),
            *(
                [
                    (
                        "pages",
                        f"{report.pages_checked} checked, of which {report.pages_known_corrupt} "
                        "are as corrupt as they were in the source",
                    )
                ]
                if report.level == VerifyLevel.FULL
                else []
            ),
            ("took", humane.span(report.seconds)),
        ]
    )
    if report.damage:
        printer.table(
            ("damaged object", "problem"),
            [(damage.object, damage.problem) for damage in report.damage],
        )
