"""What commands ask for and what they answer, as plain values; their fields are the JSON's names.

LSNs are text as PostgreSQL prints it, times are ISO 8601 in UTC, sizes are bytes, so that
``dataclasses.asdict`` is the ``--json`` document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from dbmodule.ident import BackupId, BackupType


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """One backup, as asked for."""

    type: BackupType
    label: str = ""
    baseline_id: BackupId | None = None
    """Pins the backup to build on; None is the rule of `type`."""
    detect: str = "auto"
    """``auto``, ``wal``, ``scan`` or ``content``."""
    offline: bool = False
    """The server is stopped cleanly; back up its directory as it lies there."""
    spread_checkpoint: bool = False
    """Wait for a spread checkpoint rather than force a fast one."""
    fallback: BackupType | None = None
    """``full``: take one when there is no baseline that may be built on."""
    dry_run: bool = False
    """Count what would be stored, and store nothing."""


@dataclass(frozen=True, slots=True)
class CorruptPage:
    """A page that failed its checksum for good, and was stored as it was found."""

    path: str
    block: int
    """Within the fork."""
    lsn: str
    expected: int
    """Checksum that the page's bytes give."""
    actual: int
    """Checksum that the page carries."""
    tablespace: int | None
    database: int | None
    relfilenode: int | None
    fork: str | None
    database_name: str | None
    """Names are those of the time of the backup; None where they are not known."""
    relation_name: str | None
    table_name: str | None
    last_good: str | None
    """The newest earlier backup whose copy of the page is good; None when there is none."""


@dataclass(frozen=True, slots=True)
class BackupReport:
    backup_id: str
    type: str
    baseline_id: str | None
    status: str
    """``completed`` or ``completed_with_corruption``."""
    label: str
    cluster: str
    system_identifier: str
    server_version: str
    timeline: int
    start_lsn: str
    stop_lsn: str
    detector: str
    detector_reason: str
    files_total: int
    files_read: int
    files_skipped: int
    pages_total: int
    pages_changed: int
    pages_stored: int
    bytes_total: int
    bytes_read: int
    bytes_changed: int
    bytes_stored: int
    wal_bytes: int
    pages_verified: int
    corrupt_pages: int
    divergent_pages: int
    hint_pages: int
    started_at: str
    finished_at: str
    seconds: float
    phases: Mapping[str, float]
    corruption: list[CorruptPage] = field(default_factory=list)
    """The first of the corrupt pages, as much of them as is kept."""
    hold: str | None = None
    """Until when it is kept whatever the policy says: ISO 8601, ``forever``, or None."""


@dataclass(frozen=True, slots=True)
class RelationChange:
    """What a backup stored of one fork of a relation."""

    tablespace: int
    database: int
    relfilenode: int
    fork: str
    pages_changed: int
    database_name: str | None = None
    """None for shared relations, and where the server's catalogs could not be read."""
    relation_name: str | None = None
    """With its schema, as it was called when the backup was taken."""
    table_name: str | None = None
    """Of an index or a TOAST relation the table that it belongs to, else as `relation_name`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRunReport(BackupReport):
    """What a backup would have been; `backup_id` names nothing that exists."""

    relations: list[RelationChange]
    """Most changed pages first."""
    dry_run: bool = True


@dataclass(frozen=True, slots=True)
class BackupDetails:
    """`show`: a backup, its chain from the full down, and what to know about it."""

    backup: BackupReport
    chain: list[str]
    dependents: list[str]
    corruption: list[CorruptPage]
    tablespaces: Mapping[str, str]
    """Tablespace OID → location on the source."""
    manifest_hash: str
    relations: list[RelationChange]
    """Most changed pages first."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    target: Path
    backup: str = "latest"
    """A backup id or ``latest``."""
    tablespace_map: Mapping[str, Path] = field(default_factory=dict)
    """Location on the source → location here."""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    backup_id: str
    chain: list[str]
    target: str
    files: int
    bytes_written: int
    pages_from: Mapping[str, int]
    """Backup id → pages that were taken from it."""
    seconds: float
    phases: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ExpireReport:
    """What an expiry has done, or would do."""

    removed: list[str]
    """Backups, dependents first."""
    spared: list[str]
    """Backups that were to go, and stay because others that stay depend on them."""
    postponed: str
    """Why nothing was removed this time; empty when nothing was in the way."""
    packs_condemned: int
    """No backup needs them any more; a later expiry removes them."""
    bytes_condemned: int
    packs_removed: int
    bytes_removed: int
    packs_rewritten: int
    """Of these packs little was in use; it was copied, and a later expiry removes them."""
    bytes_rewritten: int
    """The packs' size."""
    dry_run: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Damage:
    object: str
    problem: str


class VerifyLevel(StrEnum):
    """How closely `verify` looks; each level finds what those before it find."""

    QUICK = "quick"
    """Documents by their hashes, packs by being there with their size."""
    NORMAL = "normal"
    """Every stored byte by its hash."""
    FULL = "full"
    """Every page by its own checksum, too."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    status: str
    """``sound`` or ``damaged``."""
    backups: list[str]
    objects_checked: int
    bytes_read: int
    damage: list[Damage]
    seconds: float
    level: VerifyLevel = VerifyLevel.NORMAL
    pages_checked: int = 0
    pages_known_corrupt: int = 0
    """Of these: pages that are as corrupt as the source's were, which is no damage."""


@dataclass(frozen=True, slots=True)
class RetentionDecision:
    """What becomes of one backup, and why."""

    backup_id: str
    keep: bool
    reasons: list[str]
    finished_at: str | None
    """None when its manifest cannot be read."""


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """`expire`: the plan, and as much of it as was carried out."""

    dry_run: bool
    policy: Mapping[str, int]
    """Name of a rule → number; empty = nothing is ever removed."""
    decisions: list[RetentionDecision]
    removal: ExpireReport | None
    """None when nothing could be tried: a manifest cannot be read."""
    hint: str
    """How to configure a policy where there is none; else empty."""


@dataclass(frozen=True, slots=True)
class HoldReport:
    backup_id: str
    hold: str
    """Until when: ISO 8601, or ``forever``."""


@dataclass(frozen=True, slots=True)
class ReleaseReport:
    backup_id: str
    released: int
    """How many holds there were; more than one only if two were placed at once."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check`."""

    name: str
    severity: str
    """``ok``, ``warning`` or ``error``."""
    evidence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class CheckReport:
    status: str
    """The worst severity among the findings."""
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class InitReport:
    config: str
    repository: str
    repository_id: str
    repository_created: bool
    encrypted: bool
    cluster: str
    system_identifier: str
    server_version: str
    extension: str
    """``created``, ``present``, ``skipped`` or ``failed: …``."""
    findings: list[Finding]
    next_command: str


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A master key of an encrypted repository; the key itself is nowhere."""

    key_id: str
    kind: str
    """``key`` or ``passphrase``."""
    label: str
    created_at: str
    current: bool
    """Was the repository opened with it?"""
    problem: str = ""
    """Why nothing else is known of it."""


@dataclass(frozen=True, slots=True)
class KeyRotation:
    added: KeyInfo
    revoked: str
    """Id of the master key that was in use until then."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """Where a further master key comes from; exactly one of the two is set."""

    file: Path | None = None
    """Made, with a random key, if it does not exist."""
    command: str = ""
    """Prints the key; run without a shell."""
