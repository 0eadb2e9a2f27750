"""``dbmodule list``: the backups, as a tree of chains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import click

from dbmodule.reports import BackupReport
from dbmodule_cli import humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.command("list", cls=Command)
@pass_invocation
def command(invocation: Invocation) -> None:
    """List the backups of the cluster, each below the one that it depends on."""
    backups = invocation.open_app().backups()
    invocation.report(
        {"backups": [as_document(backup) for backup in backups]},
        lambda printer: _show(printer, backups),
    )


def _show(printer: Printer, backups: Sequence[BackupReport]) -> None:
    if not backups:
        printer.line("no backups yet; take one with: dbmodule backup full")
        return
    held = any(backup.hold for backup in backups)
    columns = ("backup", "type", "status", "age", "pages", "changed", "stored", "took", "label")
    printer.table(
        (*columns, "held until") if held else columns,
        [
            (
                (guide if printer.draws_trees else "") + backup.backup_id,
                backup.type,
                backup.status,
                humane.age(backup.finished_at),
                str(backup.pages_total),
                str(backup.pages_changed),
                humane.size(backup.bytes_stored),
                humane.span(backup.seconds),
                backup.label,
                *([backup.hold or ""] if held else []),
            )
            for guide, backup in chain_rows(backups)
        ],
    )


def chain_rows(backups: Sequence[BackupReport]) -> Iterator[tuple[str, BackupReport]]:
    """Every backup once, right below its baseline, with the guides that draw the tree.

    Backups keep their order among those of one baseline; one whose baseline is not listed stands
    at the top. A stack, not recursion: an incremental chain may be longer than Python's is deep.
    """
    known = {backup.backup_id for backup in backups}
    children: dict[str | None, list[BackupReport]] = defaultdict(list)
    for backup in backups:
        children[backup.baseline_id if backup.baseline_id in known else None].append(backup)
    stack = [("", "", backup) for backup in reversed(children[None])]
    while stack:
        indent, guide, backup = stack.pop()
        yield indent + guide, backup
        if guide:
            indent += "|  " if guide == "|- " else "   "
        below = children[backup.backup_id]
        stack += [
            (indent, "|- " if child is not below[-1] else "`- ", child) for child in reversed(below)
        ]
