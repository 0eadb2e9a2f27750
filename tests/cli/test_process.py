"""What only a process of its own can show: signals, start-up, pipes and terminals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The library that the process sees: it works until it is stopped, and says on standard error when
# it has begun.
_PROGRAM = """
import sys, threading, types
from dbmodule.errors import CancelledError
from tests.cli import fake_app

class App(fake_app.App):
    def backup(self, options, *, progress, cancelled):
        progress("copy", 1 << 20, 1 << 30)
        print("begun", file=sys.stderr, flush=True)
        while options.label != "deaf" and not cancelled():
            threading.Event().wait(0.01)
        threading.Event().wait(60 if options.label == "deaf" else 0)
        raise CancelledError("backup cancelled")

    def check(self):
        try:
            print("begun", file=sys.stderr, flush=True)
            threading.Event().wait(60)
        finally:
            print("cleaned up", file=sys.stderr, flush=True)

    def run_agent(self, *, stop):
        print("begun", file=sys.stderr, flush=True)
        stop.wait(60)

sys.modules["dbmodule.app"] = types.SimpleNamespace(App=App)
from dbmodule_cli.main import main
main()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DBMODULE_")}
    return kept | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}",
        "DBMODULE_REPOSITORY__URL": str(tmp_path / "repository"),
        "TERM": "xterm",
        "COLUMNS": "300",
    }


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Starts a command line, and returns when it has begun its work."""
    with contextlib.ExitStack() as started:

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = started.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            started.callback(process.kill)
            _await(process, "begun")
            return process

        yield start


def _await(process: subprocess.Popen[str], text: str) -> None:
    """Read standard error until it has `text`; unbuffered, or select would not see the rest."""
    assert process.stderr is not None
    shown = b""
    while text.encode() not in shown:
        assert select.select([process.stderr], [], [], 20)[0], f"waited in vain for {text!r}"
        part = os.read(process.stderr.fileno(), 4096)
        assert part, f"ended before {text!r}: {shown!r}"
        shown += part


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_stops_a_backup_in_an_orderly_way(
    start: Start, number: signal.Signals, code: int
) -> None:
    process = start("backup", "full", "--json")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    error = json.loads(out)["error"]
    assert (error["code"], error["message"]) == ("cancelled", "backup cancelled")
    assert "No backup was made" in error["hint"]
    assert "once more to exit at once" in err


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_the_second_signal_exits_at_once(start: Start, number: signal.Signals, code: int) -> None:
    process = start("backup", "full", "--label", "deaf", "--json")
    process.send_signal(signal.SIGINT)
    _await(process, "once more")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code
    error = json.loads(out)["error"]
    assert error["code"] == "cancelled"
    assert number.name in error["message"]
    assert "No backup was made" in error["hint"]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_breaks_off_a_short_command(
    start: Start, number: signal.Signals, code: int
) -> None:
    process = start("check")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert "cleaned up" in err
    assert f"error: {'interrupted' if code == 130 else 'terminated'}" in err
    assert "hint: Nothing was changed." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_is_the_agents_ordinary_end(
    start: Start, number: signal.Signals, code: int
) -> None:
    process = start("agent", "--json")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(out) == {"status": "stopped", "signal": number.name}


@pytest.mark.parametrize("arguments", [["--help"], ["backup", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(environment: dict[str, str], arguments: list[str]) -> None:
    program = """
import sys
from dbmodule_cli.main import run
run(sys.argv[1:])
heavy = {"numpy", "sqlalchemy", "psycopg", "rich", "pydantic", "zstandard", "blake3"}
sys.exit(",".join(sorted(heavy & sys.modules.keys())) or 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 0, result.stderr


def test_a_closed_pipe_is_no_traceback(environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "list"],
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=20,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_locale_that_lacks_a_character_is_no_error(environment: dict[str, str]) -> None:
    program = _PROGRAM.replace(
        "class App(fake_app.App):",
        "fake_app.App.answers['backups'] = [fake_app.backup_report(label='表')]\n"
        "class App(fake_app.App):",
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "list"],
        env=environment | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=20,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u8868" in result.stdout


def test_a_full_disk_under_standard_output_is_an_error(environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", _PROGRAM, "list"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
        )
    assert result.returncode != 0
    assert "No space left" in result.stderr


def _on_a_terminal(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments], env=environment, stdout=end, stderr=end
    )
    os.close(end)
    shown = b""
    interrupted = False
    while select.select([terminal], [], [], 20)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux reports the closed other end so.
            break
        shown += part
        if b"begun" in shown and not interrupted:
            process.send_signal(signal.SIGINT)
            interrupted = True
    os.close(terminal)
    return process.wait(20), shown.decode()


def test_a_terminal_gets_a_coloured_tree(environment: dict[str, str]) -> None:
    environment.pop("NO_COLOR", None)
    code, shown = _on_a_terminal(environment, "list")
    assert code == 0
    assert "\x1b[32mcompleted" in shown
    assert "`- 20260201-235959-diff-4d5e6f" in shown
    code, shown = _on_a_terminal(environment | {"NO_COLOR": "1"}, "list")
    assert "\x1b[3" not in shown
    assert "`- 20260201-235959-diff-4d5e6f" in shown
    code, shown = _on_a_terminal(environment | {"TERM": "dumb"}, "list")
    assert "\x1b" not in shown
    assert "`-" not in shown


def test_progress_bars_are_for_terminals(environment: dict[str, str]) -> None:
    code, shown = _on_a_terminal(environment, "backup", "full")
    assert code == 130
    assert "copy" in shown
    assert "1.0/1,024.0 MiB" in shown or "0.0/1.0 GiB" in shown
    code, shown = _on_a_terminal(environment, "backup", "full", "--quiet")
    assert code == 130
    assert "copy" not in shown
