"""The results as a picture and as a table."""

from __future__ import annotations

from evaluation import Outcome, baselines, forks, interval, percentile, summary, within

from fork_attn.reason.scene import Group, Line, Mark, Scene, Text

TITLE = "Countdown: share of problems solved within a budget"
BUDGETS = {
    "critical_path_tokens": (40, 60, 80, 100, 120, 160, 200, 300),
    "seconds": (250, 500, 1000, 1500, 2000, 3000, 4000, 6000),
    "total_tokens": (40, 80, 120, 160, 200, 240, 320, 400),
}
PANELS = (
    ("critical_path_tokens", "tokens one after another", 1.0),
    ("seconds", "milliseconds, one problem at a time", 1e3),
    ("total_tokens", "tokens in all threads", 1.0),
)
COLOURS = {"parallel": "thread", "serial": "limit"}
WIDTH, HEIGHT, MARGIN, GAP = 1200.0, 380.0, 56.0, 64.0


def draw(found: dict[str, list[Outcome]], title: str = TITLE) -> Scene:
    """One panel for each kind of budget: the share of problems solved within it."""
    scene = Scene(WIDTH, HEIGHT, title)
    marks: list[Mark] = [Text(MARGIN, 34, title, "title", bold=True)]
    x = MARGIN
    for name, outcomes in found.items():
        colour = COLOURS[name]
        accuracy = summary(outcomes)["accuracy"]
        marks.append(Line(((x, 56), (x + 24, 56)), colour, 3))
        marks.append(Text(x + 30, 60, f"{name}: {accuracy:.1%} solved in the end", "faint"))
        x += 250
    scene.groups.append(Group(marks))
    width = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
    for i, (field, label, scale) in enumerate(PANELS):
        left = MARGIN + i * (width + GAP)
        scene.groups.append(Group(_panel(found, field, label, scale, left, width)))
    return scene


def _panel(
    found: dict[str, list[Outcome]], field: str, label: str, scale: float, left: float, width: float
) -> list[Mark]:
    top, bottom = 92.0, HEIGHT - 56
    every = [getattr(o, field) for outcomes in found.values() for o in outcomes]
    values = [value for value in every if value is not None]
    most = percentile(values, 0.99) * 1.05
    marks: list[Mark] = []
    for tenth in range(0, 11, 2):
        y = bottom - (bottom - top) * tenth / 10
        marks.append(Line(((left, y), (left + width, y)), "edge", 1))
        marks.append(Text(left - 6, y + 4, f"{10 * tenth}%", "faint", "faint", anchor="end"))
    for tick in _ticks(most * scale):
        x = left + width * tick / scale / most
        marks.append(Text(x, bottom + 17, f"{tick:g}", "faint", "faint", anchor="middle"))
    marks.append(Text(left, bottom + 38, f"within so many {label}", "faint"))
    for name, outcomes in found.items():
        points = []
        for step in range(201):
            budget = most * step / 200
            share = within(outcomes, field, budget)
            points.append((left + width * step / 200, bottom - (bottom - top) * share))
        marks.append(Line(tuple(points), COLOURS[name], 2.5))
    return marks


def _ticks(most: float) -> list[float]:
    step = next(s for s in (10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000) if most / s <= 6)
    return [step * i for i in range(int(most / step) + 1)]


def table(found: dict[str, list[Outcome]]) -> str:
    """Markdown: a row for each model, how it forks, then shares solved within budgets with 95 %
    intervals.
    """
    rows = [
        "| | solved | tokens in all | one after another | 95th percentile | ms | 95th |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in found.items():
        s = summary(outcomes)
        rows.append(
            f"| {name} | {_share(s['accuracy'], len(outcomes))} | {s['total_tokens']:.1f} | "
            f"{s['critical_path_tokens']:.1f} | {s['critical_path_tokens_p95']} | "
            f"{s['milliseconds']:.0f} | {s['milliseconds_p95']:.0f} |"
        )
    for name, share in baselines(next(iter(found.values()))).items():
        rows.append(f"| {name} | {share:.1%} |" + " |" * 5)
    rows += ["", "| | pairs | problems | forked | right width | solved |", "|---" * 6 + "|"]
    for name, outcomes in found.items():
        rows += [f"| {name} | {' | '.join(map(str, f.values()))} |" for f in forks(outcomes)]
    for field, label, scale in PANELS:
        counts = {
            name: sum(getattr(o, field) is not None for o in outcomes)
            for name, outcomes in found.items()
        }
        heads = " | ".join(map(str, BUDGETS[field]))
        rows += ["", f"| solved within so many {label} | {heads} |"]
        rows.append("|---" * (len(BUDGETS[field]) + 1) + "|")
        for name, outcomes in found.items():
            cells = " | ".join(
                _share(within(outcomes, field, budget / scale), counts[name])
                for budget in BUDGETS[field]
            )
            rows.append(f"| {name} ({counts[name]} problems) | {cells} |")
    return "\n".join(rows) + "\n"


def _share(share: float, count: int) -> str:
    low, high = interval(share, count)
    return f"{share:.1%} ({100 * low:.0f} to {100 * high:.0f})"
