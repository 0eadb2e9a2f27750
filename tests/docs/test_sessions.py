"""What the README and the quickstart show is what happens: every command and statement is run.

A fenced block with the info string ``console`` is a session. In it ``$ `` begins a shell command,
``postgres=# `` a statement for psql, ``> `` and ``postgres-# `` go on with either, and all else is
output; a line ``…`` stands for any lines. All blocks of a page are one session in one shell. Output
is compared by shape: numbers, sizes, times and identifiers may differ, nothing else.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fix_cluster import ClusterFactory, Clusters

ROOT = Path(__file__).parents[2]
SECONDS = 60.0

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROMPTS = {"$ ": "> ", "postgres=# ": "postgres-# "}
_MASKS = (
    (r"\d{8}-\d{6}-(full|diff|incr)-[0-9a-f]{6}", r"ID-\1"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[0-9.]*\+\d\d(:\d\d)?", "MOMENT"),
    (r"\b[0-9A-F]{1,8}/[0-9A-F]{1,8}\b", "LSN"),
    (r"\b[0-9a-f]{16,64}\b", "HEX"),
    (r"\d+(\.\d+)+|\d+", "N"),
    (r"N min N s\b|N h N min\b|N s\b", "SPAN"),
    (r"N (bytes|kB|MB|GB)\b", "SIZE"),
    (r"just now|N (minute|hour)s? ago", "AGE"),
    (r"^(extension: +)(created|plain)$", r"\1MADE"),
    (r"^(ok +checksum kernel +)\w+$", r"\1KERNEL"),
    (r"-?\bN\b", "N"),
    (r"-{2,}", "--"),
    (r" +", " "),
)


@dataclass
class Step:
    """A command or statement, and what the page shows as its output."""

    prompt: str
    text: str
    shown: list[str] = field(default_factory=list)


def steps_of(page: str) -> list[Step]:
    steps: list[Step] = []
    for block in _BLOCK.findall(page):
        at_start = True
        for line in block.splitlines():
            prompt = next((p for p in _PROMPTS if line.startswith(p)), None)
            if prompt is not None:
                steps.append(Step(prompt, line.removeprefix(prompt)))
            elif at_start:
                raise AssertionError(f"a session begins with output: {line!r}")
            elif not steps[-1].shown and line.startswith(_PROMPTS[steps[-1].prompt]):
                steps[-1].text += "\n" + line.removeprefix(_PROMPTS[steps[-1].prompt])
            else:
                steps[-1].shown.append(line)
            at_start = False
    return steps


def shape(lines: list[str]) -> list[str]:
    """`lines` without what differs from run to run; empty lines do not count."""
    masked = []
    for line in lines:
        text = line.strip()
        for pattern, replacement in _MASKS:
            text = re.sub(pattern, replacement, text)
        if text.strip():
            masked.append(text.strip())
    return masked


def same_shape(shown: list[str], real: list[str]) -> bool:
    pattern = "".join(
        "(?:.*\n)*" if line == "…" else re.escape(line) + "\n" for line in shape(shown)
    )
    return re.fullmatch(pattern, "".join(line + "\n" for line in shape(real))) is not None


class Shell:
    """One bash for a whole page. `places` maps paths that the page names to those used here."""

    def __init__(self, directory: Path, path: str, env: Mapping[str, str] | None = None) -> None:
        self.places: dict[str, str] = {}
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={
                "PATH": path,
                "HOME": str(directory),
                "PGUSER": "postgres",
                "LC_ALL": "C.UTF-8",
                **(env or {}),
            },
        )

    def run(self, step: Step) -> tuple[list[str], int]:
        """The output of one step and its exit code."""
        command = self._here(step.text)
        if step.prompt != "$ ":
            command = f"psql -X -w -v ON_ERROR_STOP=1 postgres -c {shlex.quote(command)}"
        assert self._process.stdin is not None
        end = "--the end of the output--"
        script = f"{{ {command}\n}} </dev/null\nprintf '\\n%s %s\\n' '{end}' $?\n"
        self._process.stdin.write(script.encode())
        self._process.stdin.flush()
        out = self._read_until(f"\n{end} ")
        output, _, code = out.rpartition(f"\n{end} ")
        return self._there(output).splitlines(), int(code)

    def _read_until(self, end: str) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + SECONDS
        out = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not re.search(re.escape(end).encode() + rb"\d+\n$", out):
                assert selector.select(deadline - time.monotonic()), f"no end: {out.decode()}"
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                assert part, f"the shell ended: {out.decode()}"
                out += part
        return out.decode()

    def _here(self, text: str) -> str:
        for shown, real in sorted(self.places.items(), key=lambda p: -len(p[0])):
            text = text.replace(shown, real)
        return text

    def _there(self, text: str) -> str:
        for shown, real in sorted(self.places.items(), key=lambda p: -len(p[1])):
            text = text.replace(real, shown)
        return text

    def close(self) -> None:
        """End the shell, and what it left running in the background."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"kill $(jobs -p) 2>/dev/null; wait; exit\n")
        self._process.stdin.close()
        self._process.wait(SECONDS)
        self._process.stdout.close()


def make_programs(directory: Path, bindir: Path, os_user: str) -> str:
    """A PATH on which dbmodule and the server's programs are.

    PostgreSQL refuses to run as root: there its two programs that start servers change the user,
    as `runuser` at the head of the line would.
    """
    programs = directory / "bin"
    programs.mkdir()
    path = [str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
    source = f"PYTHONPATH={':'.join(path)}"
    command = "from dbmodule_cli.main import main; main()"
    scripts = {"dbmodule": ["env", source, sys.executable, "-c", command]}
    if os.geteuid() == 0:
        switch = ["setpriv", "--reuid", os_user, "--regid", os_user, "--clear-groups"]
        scripts |= {name: [*switch, str(bindir / name)] for name in ("initdb", "pg_ctl")}
    for name, words in scripts.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        program.chmod(0o755)
    return f"{programs}:{bindir}:/usr/local/bin:/usr/bin:/bin"


@pytest.fixture
def shell(clusters: Clusters, scratch: Path, make_cluster: ClusterFactory) -> Iterator[Shell]:
    """A shell in an empty directory, with a server as the quickstart finds one."""
    cluster = make_cluster(18, start=False)
    cluster.configure({"unix_socket_directories": str(cluster.socket_dir), "listen_addresses": ""})
    cluster.start()
    directory = scratch / "home"
    directory.mkdir()
    if os.geteuid() == 0:
        os.chown(directory, *_ids(cluster.datadir))
    path = make_programs(scratch, cluster.bindir, cluster.os_user)
    made = Shell(directory, path, {"PGHOST": str(cluster.socket_dir)})
    made.places = {
        "/home/you": str(directory),
        "/var/lib/postgresql/18/main": str(cluster.datadir),
        "/var/lib/postgresql/18/restored": str(directory / "restored"),
        "/srv/backups": str(directory / "srv"),
    }
    try:
        yield made
    finally:
        made.close()
        for data in ("source", "restored"):
            if (directory / data / "postmaster.pid").exists():
                stop = ["pg_ctl", "-D", str(directory / data), "-m", "immediate", "stop"]
                subprocess.run(stop, env={"PATH": path}, check=True)


def _ids(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid


def check_page(page: str, shell: Shell) -> None:
    steps = steps_of(page)
    shell.places = {shown: real for shown, real in shell.places.items() if shown in page}
    ran = 0
    for step in steps:
        output, code = shell.run(step)
        ran += 1
        assert code == 0, f"{step.text}\nexited with {code}:\n" + "\n".join(output)
        assert same_shape(step.shown, output), (
            f"{step.text}\nshown:\n" + "\n".join(step.shown) + "\nreal:\n" + "\n".join(output)
        )
    # Counted another way, so that a block that is not understood cannot go unnoticed.
    assert ran == len(re.findall(r"^(?:\$|postgres=#) ", page, re.MULTILINE)) > 0


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_every_command_shown_does_what_is_shown(page: str, shell: Shell) -> None:
    check_page((ROOT / page).read_text(), shell)


def test_output_of_another_shape_is_noticed(shell: Shell) -> None:
    step = Step("$ ", "echo 1 page; echo done", ["2 pages", "done"])
    output, _ = shell.run(step)
    assert not same_shape(step.shown, output)
    assert same_shape(["7 page", "…"], output)
    assert same_shape(["3 page", "done"], output)
