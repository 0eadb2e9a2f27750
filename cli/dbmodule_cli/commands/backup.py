"""``dbmodule backup``: take one backup."""

from __future__ import annotations

import click

from dbmodule.ident import BackupType, parse_backup_id
from dbmodule.reports import BackupOptions, BackupReport
from dbmodule_cli import exit_codes, humane
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer

_STOPPED = (
    "No backup was made and earlier ones are untouched; what was already stored is unreferenced "
    "and harmless. Run the command again."
)


@click.command("backup", cls=Command)
@click.argument(
    "type_", metavar="full|diff|incr", type=click.Choice([kind.value for kind in BackupType])
)
@click.option("--baseline", metavar="ID", help="Build on this backup.")
@click.option(
    "--detect",
    type=click.Choice(["auto", "scan", "content"]),
    default="auto",
    show_default=True,
    help="How changed pages are found: by page headers, or by comparing all content.",
)
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
    label: str,
    offline: bool,
    spread_checkpoint: bool,
) -> int:
    """Take one backup of the running server.

    full stores everything that the repository does not hold yet; diff stores what changed since
    the latest full backup, incr since the latest backup of any type. Exits with 3 when the backup
    is complete but pages of the source are corrupt.
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
    )
    app = invocation.open_app()
    invocation.stops_orderly(_STOPPED)
    with invocation.progress() as progress:
        report = app.backup(options, progress=progress, cancelled=invocation.interrupts.requested)
    invocation.report(as_document(report), lambda printer: show_backup(printer, report))
    return exit_codes.DONE if report.status == "completed" else exit_codes.DAMAGE


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
