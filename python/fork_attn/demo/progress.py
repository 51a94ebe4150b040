"""What the user sees while the demo works: bars on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Reporter:
    """Progress on a console. Off a terminal nothing moves: a phase prints a line when done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._moves = console.is_terminal

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """Shows that `text` is going on. The function given says at which part of `total`."""
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[at]}"),
            console=self.console,
            transient=True,
            disable=not self._moves,
        )
        began = time.perf_counter()
        with bar:
            task = bar.add_task(escape(text), total=total, at="")
            started = False

            def at(what: str) -> None:
                nonlocal started
                bar.update(task, advance=1 if started else 0, at=escape(what))
                started = True

            yield at
        self.done(text, f"{time.perf_counter() - began:.1f} s")

    def done(self, text: str, note: str) -> None:
        """Says that something is done."""
        self.console.print(f"[green]✓[/] {escape(text)} [dim]{escape(note)}[/]", highlight=False)
