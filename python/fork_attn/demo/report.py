"""The demo's results as text on a console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fork_attn.demo.compare import Measured
from fork_attn.demo.facts import Answers, Fact


def print_answers(console: Console, answers: Answers) -> None:
    """What the parent says of each fact with and without the join."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("a thread read", "with the join", "without it"):
        table.add_column(name)
    rows = zip(answers.facts, answers.with_join, answers.without_join, strict=True)
    for fact, joined, alone in rows:
        table.add_row(Text(fact.text), _answer(fact, joined), _answer(fact, alone))
    console.print(table)


def _answer(fact: Fact, text: str) -> Text:
    right = fact.is_answer(text)
    return Text(f"{'✓' if right else '✗'} {text}", style="green" if right else "red")


def print_comparison(console: Console, measured: Sequence[Measured], dtype: str) -> None:
    """Speed and memory of the same threads with and without fork-attn."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for result in measured:
        table.add_column(result.method, justify="right", no_wrap=True)
    table.add_row("threads, tokens/s", *(f"{m.tokens_per_second:.1f}" for m in measured))
    table.add_row("KV of all threads", *(f"{m.kv_bytes / 2**20:.1f} MiB" for m in measured))
    table.add_row("fork", *(f"{m.fork_seconds * 1e3:.2f} ms" for m in measured))
    table.add_row(
        "last thread to conclusion", *(f"{m.resume_seconds * 1e3:.0f} ms" for m in measured)
    )
    table.add_row("tokens read again", *(str(m.read_again) for m in measured))
    console.print(table)
    rounds = len(measured[0].rounds)
    same = all(m.token_ids == measured[0].token_ids for m in measured)
    verdict = "All write the same tokens." if same else "[yellow]Not all write the same tokens.[/]"
    console.print(
        f"[dim]{dtype} on the CPU, {_medians(rounds)}. Stock copies the prompt's cache "
        "for every thread (batched: a row each, padded) and reads the threads again to conclude."
        f"[/] {verdict}",
        highlight=False,
    )


def _medians(rounds: int) -> str:
    return (
        f"medians of {rounds} rounds taken in turn"
        if rounds > 1
        else "one round, as the machine is slow"
    )
