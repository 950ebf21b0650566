"""The progress of a recipe: one table on a terminal, lines elsewhere."""

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

EVERY = 60.0  # seconds between lines about a running step, where there is no terminal
STYLES = {"done before": "dim", "done": "green", "running": "bold", "failed": "red"}


class View:
    """Use as a context manager; `update` may be called as often as one likes."""

    def __init__(self, names: list[str], console: Console | None = None):
        self.console = console or Console()
        self._rows = {name: ["", 0.0, ""] for name in names}
        self._said = 0.0
        self._live = Live(
            console=self.console, get_renderable=self._table, refresh_per_second=2, transient=False
        )

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, name: str, state: str, seconds: float, line: str = "") -> None:
        """`state`: of `STYLES`; `line`: the last one of the step's log."""
        changed = self._rows[name][0] != state
        self._rows[name] = [state, seconds, line]
        now = time.monotonic()
        if self.console.is_terminal or not (changed or now - self._said > EVERY):
            return
        self._said = now
        end = f": {line}" if line else ""
        text = f"{name:<9} {state:<11} {duration(seconds):>8}{end}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        table.add_column("step", width=8)
        table.add_column("state", width=11)
        table.add_column("time", width=9, justify="right")
        table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
        for name, (state, seconds, line) in self._rows.items():
            shown = duration(seconds) if state else ""
            table.add_row(name, Text(state, STYLES.get(state, "")), shown, Text(line, "dim"))
        return table


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
