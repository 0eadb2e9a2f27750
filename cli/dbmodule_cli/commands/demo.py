"""``dbmodule demo``: the main job on a server of its own, from load to verified restore."""

from __future__ import annotations

from pathlib import Path

import click

from dbmodule_cli import exit_codes
from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, pass_invocation
from dbmodule_cli.output import Printer


@click.command("demo", cls=Command)
@click.option(
    "--scale",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="pgbench scale; 1 is about 15 MB.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Work in this directory and leave it there; otherwise a temporary one.",
)
@pass_invocation
def command(invocation: Invocation, scale: int, keep: Path | None) -> int:
    """Try everything on an embedded server: back up, change, back up from SQL, restore, compare.

    Needs no configuration and leaves nothing behind. Exits with 1 when the restored data differ
    from the source.
    """
    from dbmodule.demo import run_demo

    invocation.stopped_state = (
        f"{keep} was left as it was." if keep else "The demo's server and files were removed."
    )
    where = keep or "a temporary directory"
    invocation.abandoned_state = f"Its server may still run, in {where}: stop and remove it."
    with invocation.progress() as progress:
        report = run_demo(scale, keep and keep.absolute(), progress)

    def show(printer: Printer) -> None:
        printer.table(report.columns, report.rows)
        printer.line("restored data equal the source" if report.ok else "restored data DIFFER")

    invocation.report(report.as_dict(), show)
    return exit_codes.DONE if report.ok else exit_codes.FAILED
