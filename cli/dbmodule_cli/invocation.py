"""One run of the command line: the global options, and what every command needs to do its work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dbmodule_cli.interrupts import Interrupts
from dbmodule_cli.output import Printer, is_terminal, make_printer

if TYPE_CHECKING:
    from dbmodule.app import App
    from dbmodule.config import Config
    from dbmodule.ports import Progress

_STDOUT, _STDERR = 1, 2


class Invocation:
    """Global options, as far as they are parsed, and the signals received."""

    def __init__(self) -> None:
        self.config_file: Path | None = None
        self.cluster: str | None = None
        self.repo: str | None = None
        self.json = False
        self.quiet = False
        self.debug = False
        self.interrupts = Interrupts(self._last_words)
        self.stopped_state = "Nothing was changed."
        """What a stop leaves behind, as the hint of the message that reports it."""
        self.abandoned_state = ""
        """The same for the exit at the second signal, where that is something else."""

    def load_config(
        self,
        *,
        server: Mapping[str, object] | None = None,
        key_file: Path | None = None,
        missing_ok: bool = False,
    ) -> Config:
        """The configuration with the options of this run; raises `UsageError`."""
        from dbmodule.config import load_config

        repository = {"url": self.repo, "cluster": self.cluster, "key_file": key_file}
        overrides = {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in {"server": server or {}, "repository": repository}.items()
        }
        return load_config(
            self.config_file,
            overrides={section: values for section, values in overrides.items() if values},
            missing_ok=missing_ok,
        )

    def open_app(self, config: Config | None = None) -> App:
        """The library, set up as configured."""
        from dbmodule.app import App

        return App.open(config or self.load_config())

    def stops_orderly(self, state: str, stop: Callable[[], None] = lambda: None) -> None:
        """From now on a signal asks the library to stop, which leaves things in `state`."""
        self.stopped_state = state
        self.interrupts.defer(stop)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress bars if a person is watching standard error."""
        from dbmodule.ports import no_progress

        if self.quiet or not is_terminal(_STDERR):
            yield no_progress
            return
        from dbmodule_cli.terminal import progress_bars

        with progress_bars() as show:
            yield show

    def report(self, document: Mapping[str, Any], show: Callable[[Printer], None]) -> None:
        """Answer with `document` as JSON, or with what `show` makes of it for a person."""
        if self.json:
            sys.stdout.write(to_json(document))
        elif not self.quiet:
            show(make_printer())
        sys.stdout.flush()

    def report_error(self, error: Mapping[str, str]) -> None:
        """Answer with an error (``DbmoduleError.as_dict``)."""
        if self.json:
            sys.stdout.write(to_json({"error": error}))
            sys.stdout.flush()
        else:
            sys.stderr.write(_error_text(error))

    def _last_words(self, number: signal.Signals) -> None:
        error = {
            "code": "cancelled",
            "message": f"exited at once on the second signal ({number.name})",
            "hint": f"The orderly stop was cut short. {self.abandoned_state or self.stopped_state}",
        }
        if self.json:
            os.write(_STDOUT, to_json({"error": error}).encode())
        else:
            os.write(_STDERR, _error_text(error).encode())


pass_invocation = click.make_pass_decorator(Invocation)


def to_json(document: Mapping[str, Any]) -> str:
    """The one document of ``--json``; paths become text."""
    return json.dumps(document, indent=2, default=os.fspath) + "\n"


def as_document(report: Any) -> dict[str, Any]:
    """A report of `dbmodule.reports` as its JSON document."""
    return dataclasses.asdict(report)


def _error_text(error: Mapping[str, str]) -> str:
    hint = f"hint: {error['hint']}\n" if error["hint"] else ""
    return f"error: {error['message']}\n{hint}"
