"""What to copy of a listed data directory, and as what. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from dbmodule import datafile
from dbmodule.datafile import Kind
from dbmodule.ports import SourceEntry


@dataclass(slots=True)
class Plan:
    """A listed data directory, sorted by what happens to each entry."""

    directories: list[SourceEntry] = field(default_factory=list)
    links: list[SourceEntry] = field(default_factory=list)
    """Tablespaces outside the data directory."""
    files: list[tuple[str, Kind, int]] = field(default_factory=list)
    """Path, kind and listed size; without ``pg_control``, which comes last."""

    @property
    def bytes_listed(self) -> int:
        return sum(size for _, _, size in self.files)

    @property
    def tablespaces(self) -> dict[str, str]:
        """OID → location of tablespaces outside the data directory."""
        return {link.path.rpartition("/")[2]: link.target for link in self.links}


def make_plan(entries: Iterable[SourceEntry]) -> Plan:
    """Leave out what is excluded by name, and all but the ``_init`` fork of unlogged relations."""
    plan = Plan()
    by_directory: dict[str, list[SourceEntry]] = defaultdict(list)
    for entry in entries:
        directory, _, name = entry.path.rpartition("/")
        if entry.path in datafile.RECREATED_DIRECTORIES:
            continue  # a restore makes these, whatever they are here (pg_wal may be a link)
        if entry.kind == "symlink":
            plan.links.append(entry)
        elif entry.kind == "directory":
            if not datafile.contents_excluded(entry.path) and not name.startswith("pgsql_tmp"):
                plan.directories.append(entry)
        else:
            by_directory[directory].append(entry)
    for directory in sorted(by_directory):
        files = by_directory[directory]
        unlogged = datafile.unlogged_relations(e.path.rpartition("/")[2] for e in files)
        for entry in files:
            kind = datafile.classify(entry.path)
            if kind in (Kind.EXCLUDED, Kind.CONTROL):
                continue
            relation = datafile.relation(entry.path)
            if (
                relation is not None
                and relation.relfilenode in unlogged
                and relation.fork != "init"
            ):
                continue
            plan.files.append((entry.path, kind, entry.size))
    return plan
