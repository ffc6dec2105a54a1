"""What the commands of this room print for people: nothing in it is markup, and no control code gets through."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanorun.records.report import clean, encodable

LONGEST_LINE = 400
LONGEST_CELL = 64


def say(console: Console, line: str, style: str = "", longest: int = LONGEST_LINE) -> None:
    """Print one line, cleaned and cut."""
    console.print(Text(encodable(clean(line, longest=longest), console.encoding), style=style))


def print_grid(
    console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()
) -> None:
    """Print a table; the columns named in `left` hold texts, the others numbers."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        grid.add_column(title, justify="left" if title in left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(encodable(clean(cell, longest=LONGEST_CELL), console.encoding)) for cell in row))
    console.print(grid)
