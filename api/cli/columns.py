"""Rows of values: whole lines for programs in a pipe, on a terminal as much as fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from activities.contract.text import printable

GAP = 2

Row = Sequence[str | Text]


@dataclass(frozen=True)
class Column:
    """A column; those with the highest `rank` give way first, one of rank 0 never does."""

    heading: str
    rank: int = 0


def print_rows(console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print a line a row, without headings and with a tab between whole values, in a pipe.

    On a terminal print a table of the columns that fit. If not even those of rank 0 do, each row
    becomes a paragraph with a line a value.
    """
    if not console.is_terminal:
        for row in rows:
            line = "\t".join(", ".join(map(_one_value, _plain(cell).split("\n"))) for cell in row)
            console.file.write(line + "\n")  # `print` would expand the tabs
        return
    shown = _fitting(columns, rows, console.width)
    if shown:
        console.print(
            _table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])
        )
        return
    for row in rows:
        _print_paragraph(console, columns, row)


def _fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[int]:
    """Return which columns to show, in order; none when the most important ones do not fit."""
    widths = [
        max(cell_len(column.heading), *(_width(row[number]) for row in rows), 0)
        for number, column in enumerate(columns)
    ]
    # A column without any value says nothing.
    shown = [n for n in range(len(columns)) if any(_plain(row[n]) for row in rows)]
    while shown and sum(widths[n] + GAP for n in shown) - GAP > width:
        least = max(shown, key=lambda number: columns[number].rank)
        if columns[least].rank == 0:
            return []
        shown.remove(least)
    return shown


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.heading, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _print_paragraph(console: Console, columns: Sequence[Column], row: Row) -> None:
    for number, (column, cell) in enumerate(zip(columns, row, strict=True)):
        if not _plain(cell):
            continue
        if number == 0:  # long ids are there to be copied: nothing beside them
            console.print(Text(_plain(cell), style="bold"), soft_wrap=True)
        else:
            told = " · ".join(_plain(cell).split("\n"))
            console.print(Text(f"  {column.heading}: {told}" if column.heading else f"  {told}"))


def _one_value(text: str) -> str:
    """Return a value that neither a tab nor a line end can make two of."""
    return printable(text).replace("\t", " ")


def _width(cell: str | Text) -> int:
    return max(map(cell_len, _plain(cell).split("\n")))


def _plain(cell: str | Text) -> str:
    return cell if isinstance(cell, str) else cell.plain
