"""How the command line shows things: colours and tables on a terminal, plain text in a pipe, JSON for scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
"""Results. Standard output."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Everything that is not the result: progress, notes, errors. Standard error."""


def open_closed_streams() -> None:
    """Have standard streams that the caller closed lead nowhere, for what is written to them and for child processes.

    Otherwise the first files that are opened get their numbers. Call it first.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nothing, True)
            setattr(sys, name, os.fdopen(nothing, mode))


def print_json(value: Any) -> None:
    """Print `value` as indented JSON, unstyled."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a header; without a terminal, as tab-separated lines without styles."""
    if not out.is_terminal:
        print("\t".join(columns))
        for row in rows:
            print("\t".join(row))
        return
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    out.print(grid)


def printable(text: str) -> str:
    """`text` from inside a sandbox, harmless for the terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def note(message: str) -> None:
    """Tell something on standard error."""
    err.print(message, style="dim", markup=False)


def warn(message: str) -> None:
    """Tell something that the user should look at, on standard error."""
    err.print(f"warning: {message}", style="yellow", markup=False)
