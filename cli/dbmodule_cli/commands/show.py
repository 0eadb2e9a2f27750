"""``dbmodule show``: one backup in detail."""

from __future__ import annotations

import click

from dbmodule.reports import BackupDetails
from dbmodule_cli.command import Command
from dbmodule_cli.commands.backup import show_backup
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer

MOST_CHANGED = 10
"""Relations shown to a person; JSON has them all."""


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
            ("manifest", details.manifest_hash),
            *((f"tablespace {oid}", path) for oid, path in details.tablespaces.items()),
        ]
    )
    if details.relations:
        printer.table(
            ("changed most: tablespace", "database", "relfilenode", "fork", "pages"),
            [
                (
                    str(r.tablespace),
                    str(r.database),
                    str(r.relfilenode),
                    r.fork,
                    str(r.pages_changed),
                )
                for r in details.relations[:MOST_CHANGED]
            ],
        )
    if details.corruption:
        printer.table(
            ("corrupt page of", "block", "LSN", "checksum", "carried"),
            [
                (page.path, str(page.block), page.lsn, str(page.expected), str(page.actual))
                for page in details.corruption
            ],
        )
