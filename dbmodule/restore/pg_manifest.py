"""A ``backup_manifest`` as pg_basebackup writes it, for PostgreSQL's own ``pg_verifybackup``.

Format: the chapter "Backup Manifest Format" of PostgreSQL's documentation. CRC-32C is written
in the byte order of a little-endian machine, as the server's own tools do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from dbmodule.ident import format_lsn
from dbmodule.manifest import Manifest

NAME = "backup_manifest"


@dataclass(frozen=True, slots=True)
class RestoredFile:
    path: str
    size: int
    crc: int


def render(manifest: Manifest, files: Sequence[RestoredFile], modified: datetime) -> bytes:
    """The whole document, its own SHA-256 last."""
    version = 2 if manifest.version_num >= 170000 else 1
    head = [f'{{ "PostgreSQL-Backup-Manifest-Version": {version},\n']
    if version == 2:
        head.append(f'"System-Identifier": {manifest.system_identifier},\n')
    when = f"{modified:%Y-%m-%d %H:%M:%S} GMT"
    rows = []
    for file in files:
        try:
            name = {"Path": file.path.encode("utf-8", "surrogateescape").decode("utf-8")}
        except UnicodeDecodeError:
            name = {"Encoded-Path": file.path.encode("utf-8", "surrogateescape").hex()}
        row = {
            **name,
            "Size": file.size,
            "Last-Modified": when,
            "Checksum-Algorithm": "CRC32C",
            "Checksum": file.crc.to_bytes(4, "little").hex(),
        }
        rows.append(json.dumps(row))
    wal = {
        "Timeline": manifest.timeline,
        "Start-LSN": format_lsn(manifest.start_lsn),
        "End-LSN": format_lsn(manifest.stop_lsn),
    }
    text = "".join(
        (
            *head,
            '"Files": [\n',
            ",\n".join(rows),
            "],\n",
            '"WAL-Ranges": [\n',
            json.dumps(wal),
            "\n],\n",
        )
    ).encode()
    digest = hashlib.sha256(text).hexdigest()
    return text + f'"Manifest-Checksum": "{digest}"}}\n'.encode()
