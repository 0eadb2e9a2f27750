"""``dbmodule show``: one backup in detail."""

from __future__ import annotations

import click

from dbmodule.reports import BackupDetails
from dbmodule_cli.command import Command
from dbmodule_cli.commands.backup import show_backup, show_relations
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer
from dbmodule_cli.problems import show_problems


@click.command("show", cls=Command)
@click.argument("backup", metavar="ID|latest")
@pass_invocation
def command(invocation: Invocation, backup: str) -> None:
    """Show one backup: its chain, what depends on it, and its problems."""
    details = invocation.open_app().show(backup)
    document = as_document(details)
    invocation.report(
        {**document.pop("backup"), **document}, lambda printer: _show(printer, details)
    )


def _show(printer: Printer, details: BackupDetails) -> None:
    show_backup(printer, details.backup)
    printer.fields(
        [
            ("chain", " <- ".join(details.chain)),
            ("needed by", ", ".join(details.dependents) or "no other backup"),
            *([("held until", details.backup.hold)] if details.backup.hold else []),
            ("manifest", details.manifest_hash),
            *((f"tablespace {oid}", path) for oid, path in details.tablespaces.items()),
        ]
    )
    show_relations(printer, details.relations)
    show_problems(printer, details.backup, details.corruption)
