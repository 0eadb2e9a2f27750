"""Sizes, spans and moments as people read them, and text that is safe to show on a terminal."""

from __future__ import annotations

from datetime import UTC, datetime

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_SPANS = (("day", 86400), ("hour", 3600), ("minute", 60))


def size(count: int) -> str:
    """``'1.5 MB'``: units of 1024, named as PostgreSQL names them."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if abs(value) < 1023.95:
            return f"{count} {unit}" if unit == _UNITS[0] else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def span(seconds: float) -> str:
    """``'0.25 s'``, ``'12.3 s'``, ``'4 min 05 s'``, ``'3 h 20 min'``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def age(moment: str, now: datetime | None = None) -> str:
    """``'3 hours ago'`` for an ISO 8601 moment; `moment` itself when it is none."""
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for name, length in _SPANS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def visible(text: str) -> str:
    """`text` with whatever a terminal would act upon written as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
