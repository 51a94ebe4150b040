"""Threads as they grow, in a terminal: a line or two for each, indented below their parent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import rich.live
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fork_attn.reason import Event, Finished, StreamEvent, ThreadEvent, TokenEvent, Trace
from fork_attn.reason.trace_show import STYLES

_MOST_ROWS = 24
_TAIL = 4000  # characters kept of a thread's text: more than any terminal shows


@dataclass
class Row:
    """A thread on the screen."""

    label: str
    depth: int = 0
    tokens: int = 0
    text: str = ""
    status: str = "writes"


class Live:
    """Shows a stream's events. Off a terminal nothing is shown."""

    def __init__(self, console: Console, *, enabled: bool = True) -> None:
        self.console = console
        self.rows: dict[int, Row] = {}
        self._began = time.perf_counter()
        self._live = rich.live.Live(
            get_renderable=self.frame, console=console, transient=True, refresh_per_second=8
        )
        self._enabled = enabled and console.is_terminal

    def __enter__(self) -> Live:
        if self._enabled:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._enabled:
            self._live.stop()

    def watch(self, events: Iterator[StreamEvent]) -> Trace:
        """Runs a stream of one prompt to its end.

        Raises:
            RuntimeError: it ends without a trace.
        """
        for event in events:
            if isinstance(event, Finished):
                return event.trace
            self.see(event)
        raise RuntimeError("the generation ended without a trace")

    def see(self, event: TokenEvent | ThreadEvent) -> None:
        """Takes in one event."""
        if isinstance(event, TokenEvent):
            row = self.rows.setdefault(event.thread, Row(event.label))
            row.label = event.label
            row.tokens += 1
            row.text = (row.text + event.text)[-_TAIL:]
        else:
            self._thread(event.event)

    def _thread(self, event: Event) -> None:
        parent = self.rows.setdefault(event.thread, Row("root"))
        if event.kind == "fork":
            parent.status = "waits"
            for child in event.others:
                self.rows[child] = Row(f"thread {child}", parent.depth + 1)
            return
        if event.kind == "join":
            for child in event.others:
                self.rows.setdefault(child, Row(f"thread {child}")).status = "joined"
        elif event.kind in ("prune", "cancel"):
            parent.status = "pruned" if event.kind == "prune" else "cancelled"
        elif event.kind in ("malformed", "limit"):
            parent.status = event.kind
        if event.into is not None:
            parent.status = "joined" if parent.status == "waits" else parent.status
            self.rows[event.into] = Row("goes on", parent.depth)

    def frame(self) -> Group:
        """What is on the screen now; threads that still write come first to be shown."""
        rows = list(self.rows.values())
        writing = sum(row.status == "writes" for row in rows)
        total = sum(row.tokens for row in rows)
        seconds = time.perf_counter() - self._began
        head = f"{writing} threads write, {total} tokens in {seconds:.1f} s"
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        most = min(_MOST_ROWS, max(4, self.console.height - 4))
        hidden = max(0, len(rows) - most)
        width = max(20, self.console.width - 34)
        for row in _kept(rows, most):
            style = "green" if row.status == "writes" else STYLES.get(row.status, "bright_black")
            label = Text("  " * min(row.depth, 6) + row.label, style=f"bold {style}")
            text = " ".join(row.text.split())
            tail = text if len(text) <= width else "… " + text[-width + 2 :]
            shown = Text(tail, style="" if row.status == "writes" else "dim")
            table.add_row(label, Text(str(row.tokens), style="dim"), shown)
        parts: list[Text | Table] = [Text(head, style="dim"), table]
        if hidden:
            parts.append(Text(f"and {hidden} more", style="dim"))
        return Group(*parts)


def _kept(rows: list[Row], most: int) -> list[Row]:
    """At most so many rows, in order: those that write first, then the latest of the others."""
    ranked = sorted(range(len(rows)), key=lambda i: (rows[i].status != "writes", -i))[:most]
    return [rows[i] for i in sorted(ranked)]
