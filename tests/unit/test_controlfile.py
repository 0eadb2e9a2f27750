"""Control files: damage of any byte is seen; real ones are read in the integration tests."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule.controlfile import DBState, WalLevel, parse
from dbmodule.errors import SourceError
from tests.control import CRC_OFFSETS, control_file

versions = pytest.mark.parametrize("version", [1300, 1700, 1800])


@versions
def test_fields_are_read(version: int) -> None:
    control = parse(control_file(version, at_16=6, at_48=3, at_52=2, at_252=1, at_228=1 << 24))
    assert control.system_identifier == 7_000_000_000_000_000_001
    assert control.pg_control_version == version
    assert control.catalog_version == 202506291
    assert control.state is DBState.IN_PRODUCTION
    assert (control.timeline, control.prev_timeline) == (3, 2)
    assert control.wal_level is WalLevel.REPLICA
    assert control.wal_segment_size == 1 << 24
    assert control.data_checksum_version == 1


@versions
def test_the_first_sector_is_enough(version: int) -> None:
    data = control_file(version)
    assert parse(data[:512]) == parse(data)


@given(st.sampled_from([1300, 1700, 1800]), st.data())
def test_any_flipped_bit_is_found(version: int, data: st.DataObject) -> None:
    damaged = bytearray(control_file(version))
    bit = data.draw(st.integers(0, (CRC_OFFSETS[version] + 4) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SourceError):
        parse(bytes(damaged))


@pytest.mark.parametrize("size", [0, 8, 291, 295])
def test_a_short_file_is_refused(size: int) -> None:
    with pytest.raises(SourceError, match="cut short"):
        parse(control_file(1800)[:size])


@pytest.mark.parametrize("version", [1201, 1301, 1900, 0x14050000])
def test_other_versions_are_refused_by_number(version: int) -> None:
    data = bytearray(control_file(1800))
    struct.pack_into("<I", data, 8, version)
    with pytest.raises(SourceError, match=f"unknown format version {version}") as caught:
        parse(bytes(data))
    assert "13 to 18" in caught.value.hint


@pytest.mark.parametrize("field", ["at_16", "at_172"])
def test_unknown_enumeration_values_are_refused(field: str) -> None:
    with pytest.raises(SourceError, match="unknown value"):
        parse(control_file(1800, **{field: 99}))
