"""Manifests as documents: nothing is lost on the way, nothing malformed comes back."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.errors import CorruptObjectError
from dbmodule.ident import BackupType, Lsn, SystemId, Timeline
from dbmodule.manifest import Corruption, Manifest, Mark, from_body, to_body
from dbmodule.repository.document import seal, unseal
from tests.unit.strategies import KEY, backup_id, manifest, quick

# Paths may hold what os.fsdecode makes of bytes that are not UTF-8.
text = st.text(st.characters() | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
lsn = st.integers(0, 2**64 - 1).map(Lsn)
count = st.integers(0, 2**63)
corruption = st.builds(
    Corruption,
    text,
    count,
    lsn,
    count,
    count,
    last_good=st.none() | st.just(backup_id(3, BackupType.FULL)),
)
mark = st.builds(Mark, text, count, text, count, count)
when = st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC))


@quick(100)
@given(
    st.builds(
        manifest,
        st.integers(0, 999),
        st.sampled_from(BackupType),
        st.none() | st.just(backup_id(4, BackupType.FULL)),
        label=text,
        system_identifier=st.integers(0, 2**64 - 1).map(SystemId),
        timeline=st.integers(1, 2**32 - 1).map(Timeline),
        start_lsn=lsn,
        stop_lsn=lsn,
        job_id=st.none() | count,
        marks=st.lists(mark, max_size=2).map(tuple),
        corruption=st.lists(corruption, max_size=3).map(tuple),
        tablespaces=st.dictionaries(text, text, max_size=2),
        phases=st.dictionaries(text, st.floats(0, 1e9), max_size=2),
        started_at=when,
        finished_at=when,
    )
)
def test_a_manifest_survives_being_a_document(made: Manifest) -> None:
    body, _ = unseal("m", seal(to_body(made), KEY), KEY)
    assert from_body("m", body) == made


def body() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(to_body(manifest())))
    return made


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(Manifest) if f.name != "format"]
)
def test_a_missing_field_is_refused(name: str) -> None:
    damaged = body()
    del damaged[name]
    with pytest.raises(CorruptObjectError, match=r"^m: not a valid manifest"):
        from_body("m", damaged)


@pytest.mark.parametrize("name", ["root", "marks", "corruption"])
def test_a_missing_inner_field_is_refused(name: str) -> None:
    inner = body()[name]
    for field in inner[0] if isinstance(inner, list) else inner:
        damaged = body()
        value = damaged[name]
        del (value[0] if isinstance(value, list) else value)[field]
        with pytest.raises(CorruptObjectError):
            from_body("m", damaged)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(CorruptObjectError, match="surprise"):
        from_body("m", body() | {"surprise": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backup_id", "../../etc/passwd"),
        ("backup_id", 7),
        ("baseline_id", "latest"),
        ("type", "half"),
        ("start_lsn", "3000028"),
        ("stop_lsn", None),
        ("system_identifier", "x"),
        ("started_at", "yesterday"),
        ("finished_at", 12),
        ("finished_at", "2026-01-31T00:00:00"),
        ("marks", None),
        ("marks", [["ab", 1, "p", 0, 1]]),
        ("corruption", [{"path": "p"}]),
        ("corruption", [{"path": "p", "block": 1, "lsn": "x", "expected": 1, "actual": 2}]),
        ("root", None),
        ("root", {"pack": "ab", "size": "4000", "footer": 200}),
        ("files_total", "3"),
        ("files_total", None),
        ("wal_bytes", True),
        ("offline", 0),
        ("label", None),
        ("job_id", "7"),
        ("tablespaces", ["16400"]),
        ("tablespaces", {"16400": 1}),
        ("phases", {"copy": "long"}),
        ("baseline_hash", 12),
    ],
)
def test_a_malformed_field_is_refused(name: str, value: object) -> None:
    with pytest.raises(CorruptObjectError, match=r"^m: not a valid manifest"):
        from_body("m", body() | {name: value})


def test_the_body_is_for_any_json_reader() -> None:
    made = to_body(manifest())
    assert made["system_identifier"] == "7600000000000000001"  # wider than a double
    assert made["start_lsn"] == "0/3000028"
    assert made["corruption"][0]["lsn"] == "0/2000000"
