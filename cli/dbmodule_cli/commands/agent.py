"""``dbmodule agent``: carry out the jobs that SQL functions ask for."""

from __future__ import annotations

import threading

import click

from dbmodule_cli.command import Command
from dbmodule_cli.invocation import Invocation, pass_invocation


@click.command("agent", cls=Command)
@pass_invocation
def command(invocation: Invocation) -> None:
    """Carry out backups that SQL asks for, until stopped.

    Runs in the foreground, on the server's host, as the user that owns the data directory. The
    first SIGTERM or SIGINT stops it in an orderly way, which is its ordinary end: exit code 0.
    """
    stop = threading.Event()
    app = invocation.open_app()
    invocation.stops_orderly(
        "A backup that was under way was not committed; its job is taken up by the next agent.",
        stop.set,
    )
    app.run_agent(stop=stop)
    received = invocation.interrupts.received
    signal = received.name if received else None
    invocation.report(
        {"status": "stopped", "signal": signal},
        lambda printer: printer.line(f"agent stopped{f' by {signal}' if signal else ''}"),
    )
