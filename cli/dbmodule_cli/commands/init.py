"""``dbmodule init``: create the repository and the extension, and write the configuration."""

from __future__ import annotations

from pathlib import Path

import click

from dbmodule.reports import InitReport
from dbmodule_cli.command import Command
from dbmodule_cli.commands.check import show_findings
from dbmodule_cli.invocation import Invocation, as_document, pass_invocation
from dbmodule_cli.output import Printer


@click.command("init", cls=Command)
@click.option(
    "--pgdata",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The cluster's data directory; asked of the server if not given.",
)
@click.option("--dsn", help="libpq connection string; PGHOST, PGSERVICE … fill in the rest.")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Encrypt a new repository with the master key in this file; made if there is none.",
)
@click.option(
    "--extension/--no-extension",
    default=True,
    show_default=True,
    help="Install the SQL functions in the server.",
)
@pass_invocation
def command(
    invocation: Invocation,
    pgdata: Path | None,
    dsn: str | None,
    key_file: Path | None,
    extension: bool,
) -> None:
    """Set up backups of a cluster; safe to run again.

    Detects the server, creates the repository that --repo names, installs the extension and writes
    the configuration to --config (or where it was found, or to ./dbmodule.toml). Says what was
    done and what is still missing; `dbmodule check` judges whether backups will work.
    """
    from dbmodule.config import config_path

    path = (config_path(invocation.config_file) or Path("dbmodule.toml")).absolute()
    invocation.stopped_state = "Run init again: it goes on from what was done."
    config = invocation.load_config(
        server={"pgdata": pgdata and pgdata.absolute(), "dsn": dsn},
        key_file=key_file and key_file.absolute(),
        missing_ok=True,
    )
    report = invocation.open_app(config).init(config_path=path, extension=extension)
    invocation.report(as_document(report), lambda printer: _show(printer, report))


def _show(printer: Printer, report: InitReport) -> None:
    created = "created" if report.repository_created else "was there"
    printer.fields(
        [
            ("server", f"PostgreSQL {report.server_version}, system {report.system_identifier}"),
            ("repository", f"{report.repository} ({created}, id {report.repository_id})"),
            ("encryption", "on" if report.encrypted else "off"),
            ("cluster", report.cluster),
            ("extension", report.extension),
            ("configuration", report.config),
        ]
    )
    show_findings(printer, report.findings)
    printer.line(f"next: {report.next_command}")
