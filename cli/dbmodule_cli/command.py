"""What all commands share: the global options, accepted before and after the command's name, and
the exit codes at the end of the help; and a group that imports a command when it is used.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dbmodule_cli import exit_codes
from dbmodule_cli.invocation import Invocation


def _absolute(url: str) -> str:
    """A plain path is meant from here, and must mean the same in the file that init writes."""
    return url if "://" in url else str(Path(url).absolute())


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Store a global option; one that is not given leaves what stood before the command's name."""
    if value is None or value is False:
        return
    invocation = context.ensure_object(Invocation)
    match parameter.name:
        case "config":
            invocation.config_file = value
        case "cluster":
            invocation.cluster = value
        case "repo":
            invocation.repo = _absolute(value)
        case "json":
            invocation.json = True
        case "quiet":
            invocation.quiet = True
            logging.getLogger().setLevel(logging.ERROR)
        case "debug":
            invocation.debug = True
            logging.getLogger().setLevel(logging.DEBUG)


def _global_options() -> list[click.Parameter]:
    def option(name: str, help_text: str, **more: Any) -> click.Option:
        return click.Option(
            [name], help=help_text, callback=_keep, expose_value=False, is_eager=True, **more
        )

    return [
        option("--config", "Configuration file.", type=click.Path(path_type=Path), metavar="FILE"),
        option("--repo", "Repository, instead of the configured one.", metavar="URL"),
        option("--cluster", "Cluster's name in the repository.", metavar="NAME"),
        option("--json", "Print one JSON document.", is_flag=True),
        option("--quiet", "Print errors only.", is_flag=True),
        option("--debug", "Log in detail, with tracebacks.", is_flag=True),
    ]


def _complete(command: click.Command) -> None:
    command.params += _global_options()
    command.epilog = exit_codes.help_text()


class Command(click.Command):
    """A command with the global options and the table of exit codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _complete(self)


class Group(click.Group):
    """A group of such commands, itself with the global options and the exit codes."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A command that is left out is a usage error like others, so that --json can report it.
        self.no_args_is_help = False
        _complete(self)


class LazyGroup(Group):
    """A group whose commands are modules, each imported when its command is asked for."""

    def __init__(self, *args: Any, modules: Mapping[str, str], **kwargs: Any) -> None:
        """`modules`: name of a command → module that holds it as ``command``, in help's order."""
        super().__init__(*args, **kwargs)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        command: click.Command = importlib.import_module(self._modules[cmd_name]).command
        return command
