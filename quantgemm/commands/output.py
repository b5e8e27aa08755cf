# SPDX-License-Identifier: MIT
"""Tables and numbers for a terminal or a pipe, and the error that ends a command in one line."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000  # columns where there is no terminal: hardly a line is folded


class CommandError(Exception):
    """A failure that the user can act on; `main` prints its text as one line and returns 1."""


def console() -> Console:
    """Standard output as it is now. Nothing printed is read as markup, emoji codes included."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


class Grid:
    """A table. Columns are given by title, one that begins with '>' is flush right."""

    def __init__(self, title: str, *columns: str) -> None:
        self._table = Table(
            title=Text(title) if title else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            header_style="bold",
            pad_edge=False,
            show_header=any(columns),
            show_edge=False,
        )
        for column in columns:
            right = column.startswith(">")
            self._table.add_column(
                Text(column.removeprefix(">")),
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
            )

    def row(self, *cells: object, style: str = "") -> None:
        self._table.add_row(*(Text(printable(cell), style) for cell in cells))

    def line(self) -> None:
        """A rule between the rows before and those after."""
        self._table.add_section()

    def print(self, out: Console) -> None:
        if out.is_terminal:
            out.print(self._table)
        else:  # without the blanks that fill the last column
            with out.capture() as captured:
                out.print(self._table)
            lines = (line.rstrip() for line in captured.get().splitlines())
            out.print("\n".join(lines), soft_wrap=True)
        out.print()


def printable(value: object) -> str:
    """Text from a file made safe for a terminal: control characters and the like as escapes."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def one_line(text: object) -> str:
    """The text with every run of white space made a space, safe to print."""
    return printable(" ".join(str(text).split()))


def shorten(text: str, limit: int) -> str:
    """The text, its end replaced by an ellipsis if it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def size(num_bytes: float) -> str:
    """1536 -> '1.50 KiB'"""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 1024:
            return f"{num_bytes:.2f} {unit}"
    return f"{num_bytes / 1024:.2f} TiB"


def plural(count: int, noun: str) -> str:
    """(2, 'tensor') -> '2 tensors'"""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def milliseconds(seconds: float) -> str:
    """'-' for something that was not done at all"""
    return f"{seconds * 1e3:.3f}" if seconds else "-"
