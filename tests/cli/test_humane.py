"""Sizes, spans and ages, above all at the edges between units."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from dbmodule_cli import humane


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 kB"),
        (1536, "1.5 kB"),
        (1024 * 1024 - 1, "1.0 MB"),
        (5 * 1024**3, "5.0 GB"),
        (1024**4, "1.0 TB"),
        (5000 * 1024**5, "5000.0 PB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert humane.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (9.994, "9.99 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_span(seconds: float, text: str) -> None:
    assert humane.span(seconds) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-02-01T11:59:30+00:00", "just now"),
        ("2026-02-01T11:58:30Z", "1 minute ago"),
        ("2026-02-01T09:00:00", "3 hours ago"),
        ("2026-01-01T12:00:00+00:00", "31 days ago"),
        ("2027-01-01T12:00:00+00:00", "just now"),
        ("whenever", "whenever"),
    ],
)
def test_age(moment: str, text: str) -> None:
    assert humane.age(moment, datetime(2026, 2, 1, 12, tzinfo=UTC)) == text


def test_visible() -> None:
    assert humane.visible("größe 表") == "größe 表"
    assert humane.visible("a\tb\x07\udc80") == r"a\tb\x07\udc80"
