"""What the user sees while the demo works: bars and growing texts on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

LANE_COLOURS = ("blue", "yellow", "green", "magenta")


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
        seconds = time.perf_counter() - began
        self.console.print(f"[green]✓[/] {escape(text)} [dim]{seconds:.1f} s[/]", highlight=False)

    @contextmanager
    def texts(
        self,
        title: str,
        labels: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        budget: int,
    ) -> Iterator[Callable[[int, Sequence[int]], None]]:
        """Shows texts as they grow, side by side. The function given takes a lane and its tokens.

        Args:
            title: what is going on.
            labels: how each lane's text begins.
            decode: token ids to text.
            budget: the most tokens of a lane.
        """
        tokens: list[Sequence[int]] = [() for _ in labels]
        began = time.perf_counter()

        def seen(lane: int, token_ids: Sequence[int]) -> None:
            tokens[lane] = tuple(token_ids)

        def frame() -> Group:
            table = Table.grid(padding=(0, 2), expand=True)
            for _ in labels:
                table.add_column(ratio=1)
            table.add_row(*(_lane(i, label, decode(tokens[i])) for i, label in enumerate(labels)))
            total = sum(map(len, tokens))
            done = max(map(len, tokens), default=0)
            state = f"{title}: token {done} of at most {budget}, {total} in all"
            return Group(Text(state, style="dim"), table)

        if not self._moves:
            yield seen
        else:
            with Live(
                get_renderable=frame, console=self.console, transient=True, refresh_per_second=8
            ):
                yield seen
        seconds = time.perf_counter() - began
        total = sum(map(len, tokens))
        self.console.print(
            f"[green]✓[/] {escape(title)} [dim]{total} tokens, {seconds:.1f} s[/]", highlight=False
        )


def _lane(index: int, label: str, text: str) -> Text:
    colour = LANE_COLOURS[index % len(LANE_COLOURS)]
    return Text.assemble((label.strip(), f"bold {colour}"), text.replace("\n", " "))
