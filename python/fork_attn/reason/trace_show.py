"""A trace as a tree in a terminal: threads with their text, tokens and how they ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import ThreadRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

STYLES = {
    "done": "blue",
    "joined": "blue",
    "pruned": "bright_black",
    "cancelled": "bright_black",
    "limit": "yellow",
    "malformed": "red",
}


def show(trace: Trace, console: Console | None = None, *, max_chars: int = 600) -> None:
    """Prints the tree and the numbers.

    Args:
        trace: of any protocol.
        console: where; None: standard output.
        max_chars: of a thread's text; more is cut in its middle.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; show() needs it: pip install rich") from error
    console = console or Console()
    console.print(tree(trace, max_chars))
    console.print(summary(trace), highlight=False, markup=False)


def summary(trace: Trace) -> str:
    """The numbers of a trace in one or two lines."""
    lines = [
        f"{trace.total_tokens} tokens sampled, {trace.critical_path_tokens} of them one after "
        f"another: {trace.parallel_degree:.2f} at a time. "
        f"{trace.prefill_avoided} tokens of KV read on instead of computed again."
    ]
    if trace.seconds:
        lines.append(
            f"{len(trace.steps)} steps in {trace.seconds:.2f} s, {trace.coordination_share:.1%} of "
            f"it outside model and sampling; at most {trace.pages_shared} pages shared."
        )
    if trace.speculation:
        lines.append(
            f"{trace.accepted_tokens} of {trace.drafted_tokens} draft tokens accepted "
            f"({trace.acceptance_rate:.0%}), {trace.accepted_per_draft:.2f} a draft: "
            f"{trace.steps_saved} steps saved."
        )
    if trace.finish != "done":
        lines.append(f"Ended early: {trace.finish}.")
    return "\n".join(lines)


def tree(trace: Trace, max_chars: int = 600) -> Tree:
    """Children below the thread they were forked from; what goes on after a join follows them."""
    from rich.tree import Tree

    top = Tree(_head(trace))
    continued = {event.into: event.thread for event in trace.events if event.into is not None}
    nodes: dict[int, Tree] = {}  # record: where its own children hang
    homes: dict[int, Tree] = {}  # record: where it hangs itself
    for thread in trace.threads:
        if thread.id in continued:
            home = homes[continued[thread.id]]
        else:
            home = nodes[thread.parents[0]] if thread.parents else top
        homes[thread.id] = home
        nodes[thread.id] = home.add(node(trace, thread, max_chars))
    return top


def _head(trace: Trace) -> Text:
    from rich.text import Text

    prompt = " ".join(trace.prompt.split())
    prompt = prompt if len(prompt) <= 300 else prompt[:147] + " … " + prompt[-147:]
    size = f"  {len(trace.prompt_ids)} tokens, {trace.protocol} on {trace.model}"
    return Text.assemble((prompt, "bold"), (size, "dim"))


def node(trace: Trace, thread: ThreadRecord, max_chars: int) -> Text:
    """A thread's label and facts in one line, its text below; injected text is dim."""
    from rich.text import Text

    style = f"bold {STYLES[thread.status]}"
    if thread.kind != "thread" and thread.status in ("done", "joined") and not thread.depth:
        style = "bold magenta"
    head = Text.assemble(
        (thread.label or f"thread {thread.id}", style), (f"  {facts(thread)}", "dim")
    )
    body = Text()
    for text, injected in _parts(thread):
        body.append(text, "dim" if injected else "")
    body = _squeezed(body, max_chars)
    return Text.assemble(head, "\n", body) if body.plain else head


def facts(thread: ThreadRecord) -> str:
    """A thread's numbers and how it ended, in words."""
    prompt = sum(i.end - i.start for i in thread.injections if i.kind == "prompt")
    injected = len(thread.token_ids) - thread.num_sampled - prompt
    parts = [f"{thread.num_sampled} tokens" + (f" + {injected} injected" if injected else "")]
    positions = [p for p in thread.positions[prompt:] if p is not None]
    if positions:
        parts.append(f"positions {positions[0]} to {positions[-1]}")
    if thread.steps is not None:
        parts.append("steps {} to {}".format(*thread.steps))
    if thread.status != "done":
        parts.append(thread.status)
    if thread.note:
        parts.append(thread.note)
    return ", ".join(parts)


def _parts(thread: ThreadRecord) -> Iterator[tuple[str, bool]]:
    """The thread's text in runs, without the prompt: `(text, injected)`."""
    if not thread.text_ends:
        yield thread.text, False
        return
    flags = thread.injected
    prompt = {i for run in thread.injections if run.kind == "prompt" for i in (run.start, run.end)}
    start = 0
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start] or end in prompt:
            if not (start in prompt and flags[start] and end in prompt):
                yield thread.slice_text(start, end), flags[start]
            start = end


def _squeezed(text: Text, most: int) -> Text:
    """White space in one line, and an ellipsis in the middle of what is too long."""
    lines = [line for line in text.split("\n") if line.plain.strip()]
    joined = type(text)(" ").join(lines)
    start = len(joined.plain) - len(joined.plain.lstrip())
    joined = joined[start:]
    joined.rstrip()
    if len(joined) <= most:
        return joined
    return type(text).assemble(joined[: most // 2], (" … ", "dim"), joined[-(most // 2) :])
