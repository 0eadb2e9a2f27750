"""How results are shown: a small vocabulary, as aligned plain lines or, on a terminal, with rich.

Commands say what there is to show through `Printer`; only this module and `dbmodule_cli.terminal`
know how. All text passes `humane.visible`, since labels and paths come from elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from dbmodule_cli.humane import visible

Row = Sequence[str]


class Printer(Protocol):
    """Standard output for a person."""

    draws_trees: bool
    """Are guides between the rows of a tree wanted?"""

    def line(self, text: str) -> None: ...

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Names and values, one pair a line."""
        ...

    def table(self, columns: Row, rows: Sequence[Row]) -> None: ...


class PlainPrinter:
    """Aligned columns, no colour, nothing that a pipe or a log would have to strip."""

    draws_trees = False

    def line(self, text: str) -> None:
        sys.stdout.write(visible(text) + "\n")

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._columns([(f"{name}:", value) for name, value in pairs])

    def table(self, columns: Row, rows: Sequence[Row]) -> None:
        self._columns([[column.upper() for column in columns], *rows])

    def _columns(self, rows: Sequence[Row]) -> None:
        cells = [[visible(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write(line.rstrip() + "\n")


def is_terminal(descriptor: int) -> bool:
    """Does the descriptor lead to a terminal that understands cursor movements and colours?"""
    return os.isatty(descriptor) and os.environ.get("TERM", "dumb") != "dumb"


def make_printer() -> Printer:
    """The printer that fits standard output."""
    if sys.stdout is sys.__stdout__ and is_terminal(1):
        from dbmodule_cli.terminal import RichPrinter

        return RichPrinter()
    return PlainPrinter()
