"""Master keys from where the configuration says they are, and the repository that they open.

A key comes from a file, a command or the environment. It is never part of a message: what can be
read here is the key itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import subprocess
from pathlib import Path

from dbmodule.config import Config, RepositorySection
from dbmodule.errors import MasterKeyError, RepositoryError, UsageError
from dbmodule.reports import NewKey
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from dbmodule.storage import DryStore, open_store
from dbmodule.storage.durable import write_new

_LONGEST = 4096
_COMMAND_SECONDS = 120


def open_repository(config: Config, *, dry: bool = False) -> Repository:
    """The configured repository, opened with the configured key; `dry` writes nothing to it."""
    store = open_store(config.repository.url, config.repository.options)
    try:
        secret = master_secret(config.repository)
    except MasterKeyError:
        with contextlib.suppress(RepositoryError):
            # That the repository is not encrypted at all says more, and is no such error.
            Repository.open(store, Secret.new())
        raise
    return Repository.open(DryStore(store) if dry else store, secret)


def master_secret(settings: RepositorySection) -> Secret | None:
    """The configured master key; None where none is. Raises `MasterKeyError`.

    The one in the environment wins: so a copy of a key can be used where the usual one is lost.
    """
    if settings.key is not None:
        return Secret.read(os.fsencode(settings.key.get_secret_value()))
    if settings.key_file is not None:
        return _from_file(settings.key_file)
    if settings.key_command:
        return _from_command(settings.key_command)
    return None


def new_secret(source: NewKey) -> Secret:
    """The master key that is to be added; its file is made if there is none."""
    if (source.file is None) == (not source.command):
        raise UsageError("a new master key comes from a file or from a command: name one")
    if source.file is None:
        return _from_command(source.command)
    if not source.file.exists():
        make_key_file(source.file)
    return _from_file(source.file)


def make_key_file(path: Path) -> None:
    """Write a new random key, durable before anything is encrypted with it."""
    try:
        write_new(path, [Secret.new().text + b"\n"], temporary=path.parent)
    except FileExistsError:
        return
    except OSError as error:
        raise MasterKeyError(
            f"cannot write a new master key to {path}: {error.strerror}",
            hint="Name a file in a directory that exists and may be written to.",
        ) from error


def _from_file(path: Path) -> Secret:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # As PostgreSQL has it for its own keys: root may lend one to a group.
            forbidden = 0o027 if status.st_uid == 0 else 0o077
            if status.st_mode & forbidden:
                raise MasterKeyError(
                    f"the master key in {path} may be read by others: its mode is"
                    f" {stat.S_IMODE(status.st_mode):04o}",
                    hint=f"Run `chmod 600 {path}`, and rotate the key if others may have seen it.",
                )
            text = file.read(_LONGEST)
    except OSError as error:
        raise MasterKeyError(
            f"cannot read the master key in {path}: {error.strerror}",
            hint="Restore the file from where its copy is kept, or name another with key_file.",
        ) from error
    return Secret.read(text)


def _from_command(command: str) -> Secret:
    # Neither the command nor what it says goes into a message: either may hold the key.
    hint = "Run the command by hand, as the user that runs dbmodule."
    try:
        words = shlex.split(command)
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except (OSError, ValueError, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a command line"
        raise MasterKeyError(
            f"the command for the master key cannot be run: {reason}", hint=hint
        ) from None
    except subprocess.TimeoutExpired:
        raise MasterKeyError(
            f"the command for the master key did not end within {_COMMAND_SECONDS} seconds",
            hint=hint,
        ) from None
    if done.returncode != 0:
        raise MasterKeyError(
            f"the command for the master key failed with exit code {done.returncode}", hint=hint
        )
    return Secret.read(done.stdout)
