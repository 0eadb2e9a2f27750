"""``dbmodule hold``: keep a backup beyond retention."""

from __future__ import annotations

import click

from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation


@click.command("hold", cls=Command)
@click.argument("backup", metavar="ID|latest")
@click.option(
    "--keep-until",
    metavar="TIME",
    help="Hold it until then and not for ever: 2027-01-31 (to its end), 2027-01-31T18:00+01:00.",
)
@pass_invocation
def command(invocation: Invocation, backup: str, keep_until: str | None) -> None:
    """Keep a backup, and what it is built on, whatever the retention policy says.

    Without --keep-until it is held until it is released. A second hold takes the place of the
    first, sooner or later.
    """
    report = invocation.open_app().hold(backup, keep_until=keep_until)
    until = "until it is released" if report.hold == "forever" else f"until {report.hold}"
    invocation.report(
        as_document(report), lambda printer: printer.line(f"{report.backup_id} is held {until}.")
    )
