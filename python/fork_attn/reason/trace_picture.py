"""The picture of a trace: threads as lanes over the model's steps, forks and joins as curves.

What stands above each other was computed in the same step, in one batch. Each mark of a bar is what
one step gave: filled if the model sampled it, pale if it was injected.
"""

from __future__ import annotations

from fork_attn.reason.scene import SIZES, Group, Line, Rect, Scene, Text
from fork_attn.reason.text_width import wrap
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_layout import Bar, Connector, Layout, layout
from fork_attn.reason.trace_records import ThreadRecord

WIDTH = 1200.0
MARGIN = 32.0
PROMPT = 190.0  # width of the prompt's column
TOP = 112.0
BAR = 16.0
LINE = 15.0  # from one line of text to the next
GATE = 30.0  # room for the curves of a fork or a join
DROPPED = ("pruned", "cancelled")
PALE = 0.35


def draw(trace: Trace) -> Scene:
    """A scene of the whole trace, 1200 wide."""
    return _Picture(trace).scene()


def colour(thread: ThreadRecord) -> str:
    """By how a thread ended; the trunk, which others join, has a colour of its own."""
    if thread.status in DROPPED:
        return "dropped"
    if thread.status in ("limit", "malformed"):
        return thread.status
    return "thread" if thread.kind == "thread" or thread.depth else "trunk"


class _Picture:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.layout: Layout = layout(trace)
        gates = sorted({c.arrive for c in self.layout.connectors})
        room = WIDTH - 2 * MARGIN - PROMPT - GATE
        self.gate = min(GATE, 0.4 * room / len(gates)) if gates else 0.0
        self.pitch = (room - self.gate * len(gates)) / max(1, self.layout.steps)
        self.gates = gates
        self.lines = 3 if self.layout.lanes <= 8 else 1 if self.layout.lanes <= 24 else 0
        self.row = BAR + 14 + LINE * (self.lines + 1) if self.lines else BAR + 4
        self.bottom = TOP + self.layout.lanes * self.row

    def left(self, step: int) -> float:
        """Where a step's column begins, behind the curves that arrive at it."""
        before = sum(gate <= step for gate in self.gates)
        return MARGIN + PROMPT + GATE + step * self.pitch + before * self.gate

    def right(self, step: int) -> float:
        """Where the column before `step` ends."""
        return self.left(step - 1) + self.pitch if step else self.left(0)

    def top(self, bar: Bar) -> float:
        return TOP + bar.lane * self.row

    def scene(self) -> Scene:
        trace = self.trace
        scene = Scene(WIDTH, 0, f"{len(trace.threads)} threads of {trace.protocol} over time")
        body = [self._heading(), self._prompt(), *self._waits()]
        body += [Group([self._curve(c) for c in self.layout.connectors])]
        body += [self._bar(bar) for bar in self.layout.bars]
        strip = self._strip(self.bottom + 10)
        legend = self._legend(self.bottom + 84)
        scene.height = self.bottom + 108
        card = Rect(0.5, 0.5, WIDTH - 1, scene.height - 1, "card", radius=10, edge="edge")
        scene.groups = [Group([card]), *body, strip, legend]
        return scene

    def _heading(self) -> Group:
        trace = self.trace
        threads = sum(thread.kind == "thread" for thread in trace.threads)
        title = f"{trace.protocol}: {threads} threads" if threads else f"{trace.protocol}: no fork"
        numbers = [
            f"{trace.total_tokens} tokens sampled, {trace.critical_path_tokens} of them one after "
            f"another: {trace.parallel_degree:.2f} at a time",
            f"{trace.prefill_avoided} tokens not computed again",
            trace.model,
        ]
        if trace.seconds:
            numbers.insert(1, f"{trace.seconds:.2f} s")
        return Group(
            [
                Text(MARGIN, 42, title, "title", bold=True),
                Text(MARGIN, 66, " · ".join(numbers), "faint", "faint"),
            ]
        )

    def _prompt(self) -> Group:
        n = len(self.trace.prompt_ids)
        lines = wrap(self.trace.prompt, PROMPT, max(2, self.lines + 2))
        marks: list[Rect | Line | Text] = [
            Rect(MARGIN, TOP, PROMPT, BAR, "prompt", note=self.trace.prompt),
            Text(MARGIN, TOP - 8, f"prompt, {n} tokens, read once", "faint", "faint"),
        ]
        marks += [Text(MARGIN, TOP + BAR + LINE * (i + 1), line) for i, line in enumerate(lines)]
        y = TOP + BAR / 2
        marks.append(Line(((MARGIN + PROMPT, y), (self.left(0), y)), "prompt", 3))
        return Group(marks, {"thread": "prompt"})

    def _waits(self) -> list[Group]:
        """Dotted lines: a child that waits for its join, a parent that waits for its children."""
        marks: list[Line] = []
        for c in self.layout.connectors:
            if c.kind == "fork":
                continue
            bar = self.layout.bars[c.source]
            y = self.top(bar) + BAR / 2
            start, end = self.right(bar.end), self.left(c.arrive) - self.gate
            if end > start + 2:
                marks.append(Line(((start, y), (end, y)), colour(bar.thread), dashed=True))
        for event in self.trace.events:
            if event.into is None:
                continue
            before, after = self.layout.bars[event.thread], self.layout.bars[event.into]
            y = self.top(before) + BAR / 2
            start, end = self.right(before.end), self.left(after.start)
            if end > start + 2:
                marks.append(Line(((start, y), (end, y)), colour(before.thread), dashed=True))
        return [Group(list(marks))]

    def _curve(self, c: Connector) -> Line:
        source, target = self.layout.bars[c.source], self.layout.bars[c.target]
        x1, y1 = self.left(c.arrive), self.top(target) + BAR / 2
        y0 = self.top(source) + BAR / 2
        child = target if c.kind == "fork" else source
        return Line(((x1 - self.gate, y0), (x1, y1)), colour(child.thread), 2.5, curved=True)

    def _bar(self, bar: Bar) -> Group:
        thread, y, fill = bar.thread, self.top(bar), colour(bar.thread)
        marks: list[Rect | Line | Text] = []
        gap = 1.0 if self.pitch >= 4 else 0.0
        middle = y + BAR / 2
        marks.append(Line(((self.left(bar.start), middle), (self.right(bar.end), middle)), fill))
        for start, end, low, high, injected in self._cells(bar):
            note = thread.slice_text(low, high) if thread.text_ends else ""
            if injected:
                marks.append(Rect(start, y, end - start - gap, BAR, "card"))
            opacity = PALE if injected else 1.0
            place = (start, y, end - start - gap, BAR, fill, opacity)
            marks.append(Rect(*place, note=note.strip() or " ", cell=f"{low}-{high}"))
        if thread.status in (*DROPPED, "limit", "malformed"):
            marks.append(Text(self.right(bar.end) + 3, y + BAR - 4, "✕", "faint", fill, bold=True))
        marks += self._words(bar, y + BAR + LINE)
        seen = sorted({span.thread for span in thread.context} | {w.thread for w in thread.watches})
        return Group(marks, {"thread": str(thread.id), "sees": " ".join(map(str, seen))})

    def _cells(self, bar: Bar) -> list[tuple[float, float, int, int, bool]]:
        """`(left, right, first token, token after the last, injected)` of a bar's marks.

        One for each piece where a step is wide enough to be seen, else runs of alike ones.
        """
        found: list[tuple[float, float, int, int, bool]] = []
        steps = [piece.step for piece in bar.pieces]
        for piece in bar.pieces:
            x, beside = self.left(piece.step), steps.count(piece.step)
            if self.pitch >= 4:
                part = self.pitch / beside
                x += part * sum(p.step == piece.step for p in bar.pieces if p.start < piece.start)
                found.append((x, x + part, piece.start, piece.end, piece.injected))
                continue
            last = found[-1] if found else None
            if last is not None and last[4] == piece.injected and x - last[1] < 0.5:
                found[-1] = (last[0], x + self.pitch, last[2], piece.end, piece.injected)
            else:
                found.append((x, x + self.pitch, piece.start, piece.end, piece.injected))
        return found

    def _words(self, bar: Bar, y: float) -> list[Rect | Line | Text]:
        """A thread's label and text below its bar, as much as fits before the lane's next bar."""
        thread = bar.thread
        later = [b.start for b in self.layout.bars if b.lane == bar.lane and b.start >= bar.end]
        later = [start for start in later if start > bar.start]
        x = self.left(bar.start)
        limit = (self.left(min(later)) - self.gate if later else WIDTH - MARGIN) - x - 8
        joins = [c.arrive for c in self.layout.connectors if c.source == bar.thread.id]
        joins = [step for step in joins if step >= bar.end]
        if joins:  # not across the curves of its join, if there is room before them
            before = self.left(min(joins)) - self.gate - x - 8
            limit = before if before > 150 else limit
        nothing = not bar.pieces and thread.status in ("done", "joined")
        if not self.lines or limit < 34 or nothing:
            return []
        status = "" if thread.status in ("done", "joined") else thread.status
        head = " · ".join(part for part in (thread.label, status, thread.note) if part)
        first = bar.pieces[0].start if bar.pieces else len(thread.token_ids)
        words = thread.slice_text(first, len(thread.token_ids)) if thread.text_ends else ""
        marks: list[Rect | Line | Text] = [
            Text(x, y, wrap(head, limit, 1)[0], "label", colour(thread), bold=True)
        ]
        lines = wrap(words, limit * SIZES["ink"] / SIZES["small"], self.lines)
        lines = lines if words.strip() else []
        marks += [Text(x, y + LINE * (i + 1), line, "small") for i, line in enumerate(lines)]
        return marks

    def _strip(self, y: float) -> Group:
        """How many threads each step fed, and the axis."""
        height = 34.0
        widths = [step.width for step in self.trace.steps]
        most = max(widths, default=1) or 1
        base = y + height
        marks: list[Rect | Line | Text] = []
        for start, end, width in _runs(widths):
            tall = height * width / most
            x = self.left(start)
            marks.append(Rect(x, base - tall, self.right(end) - x, tall, "axis", 0.6, 0))
        x0, x1 = self.left(0), self.right(self.layout.steps)
        marks.append(Line(((x0, base), (x1, base)), "axis", 1))
        marks.append(Text(MARGIN, base, f"threads in each step, at most {most}", "faint", "faint"))
        marks.append(Text(x0, base + 15, "step 0", "faint", "faint"))
        last = f"step {self.layout.steps - 1}"
        marks.append(Text(x1, base + 15, last, "faint", "faint", anchor="end"))
        return Group(marks)

    def _legend(self, y: float) -> Group:
        threads = self.trace.threads
        entries = [("prompt", 1.0, "prompt, shared"), ("trunk", 1.0, "trunk")]
        known = {colour(thread) for thread in threads}
        for name, text in (
            ("thread", "thread"), ("dropped", "pruned or cancelled"),
            ("limit", "stopped at a limit"), ("malformed", "malformed tags"),
        ):  # fmt: skip
            if name in known:
                entries.append((name, 1.0, text))
        if any(piece.injected for bar in self.layout.bars for piece in bar.pieces):
            entries.append(("thread", PALE, "injected, not sampled"))
        marks: list[Rect | Line | Text] = []
        x = MARGIN
        for name, opacity, text in entries:
            marks.append(Rect(x, y - 9, 12, 10, name, opacity))
            marks.append(Text(x + 17, y, text, "faint", "faint"))
            x += 38 + 7.0 * len(text)
        return Group(marks)


def _runs(values: list[int]) -> list[tuple[int, int, int]]:
    """`(start, end, value)` of runs of equal values."""
    found: list[tuple[int, int, int]] = []
    for index, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], index + 1, value)
        else:
            found.append((index, index + 1, value))
    return found
