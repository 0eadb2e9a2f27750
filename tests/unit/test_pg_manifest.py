"""The manifest for pg_verifybackup: JSON with the checksum of what comes before it."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.ident import Lsn, Timeline
from dbmodule.restore.pg_manifest import RestoredFile, render
from tests.unit.strategies import manifest, quick

WHEN = datetime(2026, 1, 31, 23, 59, 58, tzinfo=UTC)
raw_paths = st.binary(min_size=1, max_size=20)


def parsed(document: bytes) -> dict[str, Any]:
    """The document, after its own checksum was checked as the server's tools do."""
    *_, last, nothing = document.split(b"\n")
    assert nothing == b""
    covered = document[: len(document) - len(last) - 1]
    body: dict[str, Any] = json.loads(document.decode("ascii"))
    assert body["Manifest-Checksum"] == hashlib.sha256(covered).hexdigest()
    assert last.startswith(b'"Manifest-Checksum"')
    return body


@quick(100)
@given(st.lists(st.tuples(raw_paths, st.integers(0, 2**40), st.integers(0, 2**32 - 1)), max_size=4))
def test_files_are_listed_as_they_are(files: list[tuple[bytes, int, int]]) -> None:
    listed = [RestoredFile(p.decode("utf-8", "surrogateescape"), s, c) for p, s, c in files]
    body = parsed(render(manifest(), listed, WHEN))
    for row, (path, size, crc) in zip(body["Files"], files, strict=True):
        encoded = row.get("Encoded-Path")
        assert path == (bytes.fromhex(encoded) if encoded else row["Path"].encode())
        assert row["Size"] == size
        assert row["Checksum-Algorithm"] == "CRC32C"
        assert bytes.fromhex(row["Checksum"]) == crc.to_bytes(4, "little")
        assert row["Last-Modified"] == "2026-01-31 23:59:58 GMT"


def test_only_a_path_that_is_not_utf8_is_encoded() -> None:
    files = [RestoredFile('base/é"\\\n', 1, 2), RestoredFile("base/\udcff", 1, 2)]
    rows = parsed(render(manifest(), files, WHEN))["Files"]
    assert rows[0]["Path"] == 'base/é"\\\n'
    assert rows[1]["Encoded-Path"] == b"base/\xff".hex()


@pytest.mark.parametrize(("version", "expected"), [(150010, 1), (169999, 1), (170000, 2)])
def test_the_system_identifier_came_with_version_17(version: int, expected: int) -> None:
    body = parsed(render(manifest(version_num=version), [], WHEN))
    assert body["PostgreSQL-Backup-Manifest-Version"] == expected
    assert body.get("System-Identifier") == (7_600_000_000_000_000_001 if expected == 2 else None)
    assert body["Files"] == []


def test_the_wal_that_must_be_there_is_named() -> None:
    made = manifest(timeline=Timeline(3), start_lsn=Lsn(0x1_0000_0028), stop_lsn=Lsn(0x1_0000_0200))
    assert parsed(render(made, [], WHEN))["WAL-Ranges"] == [
        {"Timeline": 3, "Start-LSN": "1/28", "End-LSN": "1/200"}
    ]
