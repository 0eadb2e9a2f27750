"""The extension's tables as ports: the catalog of backups and the queue of jobs."""

from dbmodule.catalog.backups import SqlCatalog
from dbmodule.catalog.grants import missing_grants
from dbmodule.catalog.queue import SqlJobQueue

__all__ = ["SqlCatalog", "SqlJobQueue", "missing_grants"]
