"""The entry point: run a command, and turn whatever ends it into output and an exit code.

It imports nothing heavy, so that help and usage errors come at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from dbmodule.errors import CancelledError, DbmoduleError, UsageError
from dbmodule_cli import exit_codes
from dbmodule_cli.command import LazyGroup
from dbmodule_cli.invocation import Invocation

_log = logging.getLogger(__name__)

_COMMANDS = (
    "init",
    "check",
    "backup",
    "list",
    "show",
    "restore",
    "verify",
    "synthesize",
    "expire",
    "hold",
    "release",
    "key",
    "agent",
    "extension",
    "demo",
)


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"dbmodule {importlib.metadata.version('dbmodule')}")
        context.exit()


@click.group(
    cls=LazyGroup,
    modules={name: f"dbmodule_cli.commands.{name}" for name in _COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def cli() -> None:
    """Full, differential and incremental backups of a PostgreSQL cluster."""


def main() -> NoReturn:
    """``dbmodule``, as installed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A label that the locale cannot show must not fail a backup that is done.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code; must be called in the main thread."""
    invocation = Invocation()
    with _logs_to_stderr(), invocation.interrupts.handled():
        try:
            code = cli.main(
                list(arguments) or ["--help"],
                prog_name="dbmodule",
                standalone_mode=False,
                obj=invocation,
            )
        except CancelledError as error:
            return _stopped(invocation, error.message, error.hint)
        except (click.Abort, KeyboardInterrupt):
            return _stopped(invocation, invocation.interrupts.word, "")
        except DbmoduleError as error:
            invocation.report_error(error.as_dict())
            return error.exit_code
        except click.ClickException as error:
            # click may stop before it has seen the option.
            invocation.json = invocation.json or "--json" in arguments
            invocation.report_error(_usage_error(error).as_dict())
            return exit_codes.USAGE
        except Exception as error:  # noqa: BLE001
            # The outermost frame: whatever comes here still owes the caller one JSON document.
            _log.debug("unexpected error", exc_info=True)
            invocation.report_error(
                DbmoduleError(
                    f"{type(error).__name__}: {error}",
                    hint="This is a mistake in dbmodule: report it with what --debug prints.",
                ).as_dict()
            )
            return exit_codes.FAILED
        return code if isinstance(code, int) else exit_codes.DONE


def _stopped(invocation: Invocation, message: str, hint: str) -> int:
    invocation.report_error(
        CancelledError(message, hint=hint or invocation.stopped_state).as_dict()
    )
    return invocation.interrupts.exit_code


def _usage_error(error: click.ClickException) -> UsageError:
    message = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "dbmodule"
    return UsageError(message[:1].lower() + message[1:], hint=f"See `{path} --help`.")


@contextlib.contextmanager
def _logs_to_stderr() -> Iterator[None]:
    """Log warnings and worse; ``--debug`` and ``--quiet`` move the level."""
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
