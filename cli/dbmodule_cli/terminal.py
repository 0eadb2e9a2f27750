"""Tables and progress bars on a terminal, with rich; imported only when there is one.

rich itself honours NO_COLOR.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from dbmodule.ports import Progress
from dbmodule_cli.humane import visible
from dbmodule_cli.output import Row

_STYLES = {
    "ok": "green",
    "sound": "green",
    "completed": "green",
    "warning": "yellow",
    "error": "bold red",
    "damaged": "bold red",
    "completed_with_corruption": "bold red",
}


def _text(cell: str) -> Text:
    return Text(visible(cell), style=_STYLES.get(cell, ""))


class RichPrinter:
    """`Printer` in colour; cells are never read as markup."""

    draws_trees = True

    def __init__(self) -> None:
        self._console = Console(highlight=False)

    def line(self, text: str) -> None:
        self._console.print(_text(text))

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        for name, value in pairs:
            grid.add_row(Text(name, style="bold"), _text(value))
        self._console.print(grid)

    def table(self, columns: Row, rows: Sequence[Row]) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, no_wrap=number == 0, overflow="fold")
        for row in rows:
            table.add_row(*map(_text, row))
        self._console.print(table)


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """A `ports.Progress` that draws one bar per phase on standard error."""
    bars = Bars(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    tasks: dict[str, TaskID] = {}

    def show(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bars.add_task(visible(phase), total=None)
        bars.update(tasks[phase], completed=done, total=total or None)

    with bars:
        yield show
