"""Tables of reports."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence, rows: Iterable[Sequence], sides: str) -> str:
    """A Markdown table, without a line end after its last line.

    Args:
      head, rows: cells of any type; a cell becomes one line, and a `|` in it is no border.
      sides: "l" or "r" of each column; the last one also holds for all columns after it.
    """
    rows = [list(map(_text, row)) for row in rows]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells in a table of {len(head)} columns")
    rule = [{"l": "---", "r": "---:"}[side] for side in sides.ljust(len(head), sides[-1])]
    lines = [map(_text, head), rule[: len(head)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")
