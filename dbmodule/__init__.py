"""Database-native full, differential and incremental backups for PostgreSQL.

The names in ``__all__`` are the public surface. They are imported when first used, so that a
program which only wants one of them (or ``dbmodule --help``) does not pay for all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbmodule.app import App
    from dbmodule.config import Config, load_config
    from dbmodule.errors import DbmoduleError
    from dbmodule.ident import BackupType
    from dbmodule.reports import BackupOptions, RestoreOptions

__all__ = [
    "App",
    "BackupOptions",
    "BackupType",
    "Config",
    "DbmoduleError",
    "RestoreOptions",
    "load_config",
]

_HOMES = {
    "App": "dbmodule.app",
    "BackupOptions": "dbmodule.reports",
    "BackupType": "dbmodule.ident",
    "Config": "dbmodule.config",
    "DbmoduleError": "dbmodule.errors",
    "RestoreOptions": "dbmodule.reports",
    "load_config": "dbmodule.config",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dbmodule' has no attribute {name!r}")
    return getattr(import_module(home), name)
