"""Tables of text for the console."""

from __future__ import annotations

from collections.abc import Sequence


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = [
            cell.ljust(width) if i == 0 or (i == len(widths) - 1 and i > 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join([first, *rest]).rstrip()

    return [line(header), *map(line, rows)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Make a table of Markdown of the same."""
    rule = ["---", *["---:"] * (len(header) - 1)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "|".join(rule) + "|", *map(line, rows)]
