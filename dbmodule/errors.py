"""The errors of dbmodule: one root, and a class per thing that a caller may want to tell apart.

    DbmoduleError                1  unexpected
    ├── UsageError               2  an argument or a configuration value makes no sense
    ├── DamageError              3  verify found damage in the repository
    ├── RefusedError             4  done as asked it could lose or mix up data
    │   ├── WrongClusterError       the repository or directory belongs to another cluster
    │   ├── NoBaselineError         there is no backup to build on
    │   ├── NotAnAncestorError      the baseline is not proven to be in this cluster's past
    │   ├── BrokenChainError        a backup that is needed is missing or damaged
    │   └── TargetError             the restore target is not safe to write to
    ├── RepositoryError          5  the repository cannot be reached or used
    │   ├── ObjectExistsError       put-if-absent found the name taken
    │   ├── ObjectMissingError      no object of that name
    │   ├── CorruptObjectError      an object's bytes are not those that were written
    │   ├── FormatVersionError      written by a newer or unknown version
    │   └── MasterKeyError          encrypted, and no key or not the right one was given
    ├── SourceError              6  the data directory cannot be read
    ├── ServerError              6  the server is unreachable, or refused
    ├── LockedError              7  another run is at work
    └── CancelledError         130  stopped by the user (143 when by SIGTERM)

A message is lower-case and names the thing and the reason; the hint is a sentence that says what
to do next. ``exit_code`` is the process's exit code, ``code`` the stable word in JSON.
"""

from __future__ import annotations


class DbmoduleError(Exception):
    """Root of all errors that dbmodule raises on purpose."""

    exit_code = 1
    code = "unexpected"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, str]:
        """The error as it appears under ``"error"`` in JSON output."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UsageError(DbmoduleError):
    exit_code = 2
    code = "usage"


class DamageError(DbmoduleError):
    exit_code = 3
    code = "damage_found"


class RefusedError(DbmoduleError):
    exit_code = 4
    code = "refused"


class WrongClusterError(RefusedError):
    code = "wrong_cluster"


class NoBaselineError(RefusedError):
    code = "no_baseline"


class NotAnAncestorError(RefusedError):
    code = "not_an_ancestor"


class BrokenChainError(RefusedError):
    code = "broken_chain"


class TargetError(RefusedError):
    code = "unsafe_target"


class RepositoryError(DbmoduleError):
    exit_code = 5
    code = "repository"


class ObjectExistsError(RepositoryError):
    code = "object_exists"


class ObjectMissingError(RepositoryError):
    code = "object_missing"


class CorruptObjectError(RepositoryError):
    code = "corrupt_object"


class FormatVersionError(RepositoryError):
    code = "format_version"


class MasterKeyError(RepositoryError):
    code = "master_key"


class SourceError(DbmoduleError):
    exit_code = 6
    code = "source"


class ServerError(DbmoduleError):
    exit_code = 6
    code = "server"


class LockedError(DbmoduleError):
    exit_code = 7
    code = "locked"


class CancelledError(DbmoduleError):
    exit_code = 130
    code = "cancelled"
