"""``dbmodule backup``: take one backup."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dbmodule.ident import BackupType, parse_backup_id
from dbmodule.reports import BackupOptions, BackupReport, DryRunReport, RelationChange
from dbmodule_cli import exit_codes, humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer
from dbmodule_cli.problems import show_problems

_STOPPED = (
    "No backup was made and earlier ones are untouched; what was already stored is unreferenced "
    "and harmless. Run the command again."
)

MOST_CHANGED = 10
"""Relations shown to a person; JSON has them all."""


@click.command("backup", cls=Command)
@click.argument(
    "type_", metavar="full|diff|incr", type=click.Choice([kind.value for kind in BackupType])
)
@click.option("--baseline", metavar="ID", help="Build on this backup.")
@click.option(
    "--detect",
    type=click.Choice(["auto", "wal", "scan", "content"]),
    default="auto",
    show_default=True,
    help="How changed pages are found: from WAL summaries (17 and later; scan where they leave a "
    "gap), by page headers, or by comparing all content.",
)
@click.option(
    "--fallback",
    type=click.Choice([BackupType.FULL.value]),
    help="Take a full backup when there is no baseline that may be built on.",
)
@click.option("--dry-run", is_flag=True, help="Count what would be stored, and store nothing.")
@click.option("--label", default="", help="A note that is kept with the backup.")
@click.option(
    "--offline", is_flag=True, help="Back up the directory of a server that was stopped cleanly."
)
@click.option(
    "--spread-checkpoint", is_flag=True, help="Wait for a spread checkpoint; gentler, but slower."
)
@pass_invocation
def command(
    invocation: Invocation,
    type_: str,
    baseline: str | None,
    detect: str,
    fallback: str | None,
    dry_run: bool,
    label: str,
    offline: bool,
    spread_checkpoint: bool,
) -> int:
    """Take one backup of the running server.

    full stores everything that the repository does not hold yet; diff stores what changed since
    the latest full backup, incr since the latest backup of any type. Exits with 3 when the backup
    is complete but pages of the source are corrupt.

    A dry run goes through everything, its checkpoint included, but leaves no mark in the catalog
    and nothing in the repository.
    """
    kind = BackupType(type_)
    if baseline is not None and kind is BackupType.FULL:
        raise click.UsageError("a full backup builds on nothing: leave out --baseline")
    if offline and spread_checkpoint:
        raise click.UsageError("--spread-checkpoint needs a running server: not with --offline")
    options = BackupOptions(
        type=kind,
        label=label,
        baseline_id=None if baseline is None else parse_backup_id(baseline),
        detect=detect,
        offline=offline,
        spread_checkpoint=spread_checkpoint,
        fallback=None if fallback is None else BackupType(fallback),
        dry_run=dry_run,
    )
    app = invocation.open_app()
    invocation.stops_orderly(_STOPPED)
    with invocation.progress() as progress:
        report = app.backup(options, progress=progress, cancelled=invocation.interrupts.requested)
    invocation.report(as_document(report), lambda printer: show_outcome(printer, report))
    return exit_codes.DONE if report.status == "completed" else exit_codes.DAMAGE


def show_relations(printer: Printer, relations: Sequence[RelationChange]) -> None:
    """Where most of the changed pages are."""
    if relations:
        printer.table(
            ("changed most", "of table", "database", "fork", "pages"),
            [
                (
                    r.relation_name or f"{r.tablespace}/{r.database}/{r.relfilenode}",
                    r.table_name or "",
                    r.database_name or (str(r.database) if r.database else "(shared)"),
                    r.fork,
                    str(r.pages_changed),
                )
                for r in relations[:MOST_CHANGED]
            ],
        )


def show_outcome(printer: Printer, report: BackupReport) -> None:
    """A backup, or what it would have been."""
    if isinstance(report, DryRunReport):
        printer.line("Nothing was stored: this is what a backup would have been.")
    show_backup(printer, report)
    show_problems(printer, report, report.corruption)
    if isinstance(report, DryRunReport):
        show_relations(printer, report.relations)


def show_backup(printer: Printer, report: BackupReport) -> None:
    """One backup in full."""
    pairs = [
        ("backup", report.backup_id),
        ("type", report.type + (f" on {report.baseline_id}" if report.baseline_id else "")),
        ("status", report.status),
        ("label", report.label),
        ("cluster", f"{report.cluster}, system {report.system_identifier}"),
        ("server", f"PostgreSQL {report.server_version}"),
        ("WAL", f"timeline {report.timeline}, {report.start_lsn} to {report.stop_lsn}"),
        ("detector", f"{report.detector} ({report.detector_reason})"),
        (
            "files",
            f"{report.files_total} total, {report.files_read} read, {report.files_skipped} skipped",
        ),
        (
            "pages",
            f"{report.pages_total} total, {report.pages_changed} changed, "
            f"{report.pages_stored} stored, {report.pages_verified} verified",
        ),
        (
            "bytes",
            f"{humane.size(report.bytes_total)} total, {humane.size(report.bytes_read)} read, "
            f"{humane.size(report.bytes_changed)} changed, "
            f"{humane.size(report.bytes_stored)} stored, {humane.size(report.wal_bytes)} WAL",
        ),
        ("finished", f"{report.finished_at}, after {humane.span(report.seconds)}"),
        ("phases", ", ".join(f"{name} {humane.span(s)}" for name, s in report.phases.items())),
    ]
    problems = {
        "corrupt pages": report.corrupt_pages,
        "divergent pages": report.divergent_pages,
        "hint-bit pages": report.hint_pages,
    }
    pairs += [(name, str(count)) for name, count in problems.items() if count]
    printer.fields([(name, value) for name, value in pairs if value])
