"""``dbmodule restore``: a chain of backups → a data directory that starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from dbmodule.reports import RestoreOptions, RestoreReport
from dbmodule_cli import humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer

_UNESCAPED_EQUALS = re.compile(r"(?<!\\)=")


def _tablespace_map(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, Path]:
    """``OLD=NEW``, with ``\\=`` for an equals sign in a path, as in pg_basebackup."""
    result: dict[str, Path] = {}
    for value in values:
        parts = [part.replace("\\=", "=") for part in _UNESCAPED_EQUALS.split(value)]
        if len(parts) != 2 or not all(part.startswith("/") for part in parts):
            raise click.BadParameter(f"{value!r} is not OLD=NEW with two absolute paths")
        old, new = parts
        if old in result:
            raise click.BadParameter(f"{old} is mapped twice")
        result[old] = Path(new)
    return result


@click.command("restore", cls=Command)
@click.argument("backup", metavar="[ID|latest]", default="latest")
@click.option(
    "--target",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="New data directory; must be empty or not exist.",
)
@click.option(
    "--tablespace-map",
    metavar="OLD=NEW",
    multiple=True,
    callback=_tablespace_map,
    help="Put the tablespace that was at OLD at NEW; may be given several times.",
)
@pass_invocation
def command(
    invocation: Invocation, backup: str, target: Path, tablespace_map: dict[str, Path]
) -> None:
    """Restore a backup (by default the latest) into a new data directory that starts."""
    options = RestoreOptions(target=target.absolute(), backup=backup, tablespace_map=tablespace_map)
    app = invocation.open_app()
    invocation.stops_orderly(
        f"{options.target} is incomplete and marked so: no server starts on it. "
        "Remove it and restore again."
    )
    with invocation.progress() as progress:
        report = app.restore(options, progress=progress, cancelled=invocation.interrupts.requested)
    invocation.report(as_document(report), lambda printer: _show(printer, report))


def _show(printer: Printer, report: RestoreReport) -> None:
    printer.fields(
        [
            ("restored", report.backup_id),
            ("target", report.target),
            ("files", f"{report.files}, {humane.size(report.bytes_written)} written"),
            ("took", humane.span(report.seconds)),
            ("phases", ", ".join(f"{name} {humane.span(s)}" for name, s in report.phases.items())),
        ]
    )
    printer.table(
        ("pages from", "pages"),
        [(backup, str(report.pages_from.get(backup, 0))) for backup in report.chain],
    )
