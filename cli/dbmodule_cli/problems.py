"""What is wrong with a source, told to whoever has to put it right: which page, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from dbmodule.reports import BackupReport, CorruptPage
from dbmodule_cli.output import Printer

_MOST = 20
"""Corrupt pages shown to a person; JSON has as many as are kept."""


def show_problems(printer: Printer, report: BackupReport, pages: Sequence[CorruptPage]) -> None:
    """Corrupt and divergent pages of a backup; nothing when it has none."""
    if report.corrupt_pages:
        _show_corruption(printer, report.corrupt_pages, pages)
    if report.divergent_pages:
        printer.line(
            f"{report.divergent_pages} divergent pages: by their LSN older than the baseline and "
            "yet not what it stored. They were stored anew, so a restore brings back what the "
            "server has. Hint bits do that where neither data checksums nor wal_log_hints are on; "
            "with either, something wrote to the files behind the server's back: look at storage."
        )


def _show_corruption(printer: Printer, total: int, pages: Sequence[CorruptPage]) -> None:
    printer.line(
        f"{total} corrupt pages: however often they were read, they did not match their checksum. "
        "They are stored as they were found, so a restore of this backup brings them back."
    )
    printer.table(
        ("corrupt", "of table", "database", "block", "last good copy in", "file", "checksum"),
        [
            (
                page.relation_name or "(unknown)",
                page.table_name or "",
                page.database_name or ("(shared)" if page.database == 0 else str(page.database)),
                str(page.block),
                page.last_good or "no backup",
                page.path,
                f"{page.actual:04X}, its bytes give {page.expected:04X}",
            )
            for page in pages[:_MOST]
        ],
    )
    if total > _MOST:
        printer.line(f"The other {total - _MOST} are left out here.")
    good = sorted({page.last_good for page in pages if page.last_good is not None})
    printer.line("What to do next:")
    printer.line("- Find the cause first: look for errors of the disk and in the server's log.")
    if any(page.table_name != page.relation_name for page in pages):
        printer.line("- An index needs no backup: REINDEX builds it anew from its table.")
    for backup in good:
        printer.line(
            f"- Keep {backup}. Restore it beside the server (`dbmodule restore {backup} --target "
            "DIRECTORY`), start the copy, and take the rows of the damaged tables from there."
        )
    if any(page.last_good is None for page in pages):
        printer.line(
            "- Of some pages no backup here holds a good copy: look for one in other repositories, "
            "dumps and standbys."
        )
