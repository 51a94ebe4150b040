"""What `fork-attn demo` does, in order."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from transformers import GenerationConfig

import fork_attn.hf as hf
from fork_attn import reason
from fork_attn.demo import baseline, facts, report, weights
from fork_attn.demo.compare import METHODS, ROUNDS, Measured, compare
from fork_attn.demo.decode import Sampling
from fork_attn.demo.progress import Reporter
from fork_attn.demo.session import Session
from fork_attn.demo.threads import PROMPT, Aspects, Script, write_script
from fork_attn.reason_command.live import Live

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
PAGE_SIZE = 16


class DemoError(Exception):
    """The demo cannot run; the message says why and what to do."""


def main(args: argparse.Namespace) -> int:
    """Runs the demo on SmolLM2; `fork_attn.demo.run` with its errors raised.

    Raises:
        DemoError: bad arguments, or no weights.
    """
    reporter = Reporter(Console())
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        model, tokenizer = _load(reporter, args.cache_dir)
        script = write_script(tokenizer, PROMPT if args.prompt is None else args.prompt)
    except (weights.WeightsError, OSError, ImportError, ValueError) as error:
        raise DemoError(str(error)) from error
    return show(reporter, NAME, model, tokenizer, script, args)


def _load(
    reporter: Reporter, cache_dir: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with reporter.phase("loading transformers"):
        import transformers.models.llama.modeling_llama  # noqa: F401 (the slow part of the first use)
    if not (path := weights.converted_dir(cache_dir)).is_dir():
        with reporter.phase(f"unpacking the 4-bit weights of {NAME}, once, about 25 s"):
            weights.convert(path)
    with reporter.phase(f"loading {NAME}"):
        return weights.load(cache_dir)


def show(
    reporter: Reporter,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    script: Script,
    args: argparse.Namespace,
) -> int:
    """The demo on a loaded model, to which a cache is attached.

    Returns:
        0 if the parent knows all facts after the join, else 1.

    Raises:
        DemoError: the prompt is longer than the model's context.
    """
    console = reporter.console
    limit = model.config.max_position_embeddings
    if script.max_tokens > limit:
        raise DemoError(
            f"prompt: {len(script.prompt_ids)} tokens and what is written after them are "
            f"{script.max_tokens}, more than the {limit} that {name} can hold"
        )
    stock = None if args.no_compare else baseline.plain_copy(model)
    pages = script.max_tokens // PAGE_SIZE + 8 * (len(script.openings) + 2) + 32
    cache = hf.attach(model, num_pages=pages, page_size=PAGE_SIZE)
    session = Session(name, model, tokenizer, cache)

    console.rule("Three threads read a fact each, and join", align="left")
    with reporter.phase("reading three facts in three threads, joining them, asking"):
        answers = facts.ask(session)
    report.print_answers(console, answers)

    console.rule("A protocol: four threads think about one prompt, and join", align="left")
    sampling = Sampling(args.temperature, args.seed)
    record = _think(reporter, session, script, sampling)
    record.show(console)
    measured = [] if stock is None else _compare(reporter, session, stock, script, sampling)
    if measured:
        console.rule("What it took", align="left")
        dtype = str(cache.dtype).removeprefix("torch.")
        report.print_comparison(console, measured, dtype)
    _write(console, args.out, record, measured)
    _print_score(console, answers)
    return 0 if answers.passed else 1


def _print_score(console: Console, answers: facts.Answers) -> None:
    n = len(answers.facts)
    joined, alone = answers.score(answers.with_join), answers.score(answers.without_join)
    style = "bold green" if answers.passed else "bold red"
    console.print(f"[{style}]Facts known: {joined}/{n} with the join, {alone}/{n} without.[/]")


def _think(
    reporter: Reporter, session: Session, script: Script, sampling: Sampling
) -> reason.Trace:
    """Threads, join and conclusion, shown as they grow."""
    config = GenerationConfig(
        do_sample=sampling.temperature > 0, temperature=sampling.temperature or None
    )
    events = reason.stream(
        session.model, session.tokenizer, script.prompt, protocol=Aspects(script),
        sampling=config, seed=sampling.seed,
    )  # fmt: skip
    with closing(events), Live(reporter.console) as live:
        record = live.watch(events)
    note = f"{record.total_tokens} tokens, {record.seconds:.1f} s"
    reporter.done(f"{len(script.openings)} threads in one batch, and a conclusion", note)
    return record


def _compare(
    reporter: Reporter, session: Session, stock: PreTrainedModel, script: Script, sampling: Sampling
) -> list[Measured]:
    root = session.cache.new_branch()
    session.forward({root: script.prompt_ids})
    with reporter.phase(
        "the threads again, beside stock transformers", ROUNDS * len(METHODS)
    ) as at:
        measured = compare(
            session, stock, root, script, sampling,
            on_round=lambda method, number: at(f"round {number + 1} of {ROUNDS}: {method}"),
        )  # fmt: skip
    session.cache.free([root])
    return measured


def _write(console: Console, out: Path, record: reason.Trace, measured: list[Measured]) -> None:
    """The trace, its views, and what was measured."""
    record.save(out / "trace.json")
    record.plot(out / "threads.svg")
    record.plot(out / "threads.html")
    record.timeline(out / "timeline.json")
    names = ["trace.json", "threads.svg", "threads.html", "timeline.json"]
    if measured:
        figures = {m.method: m.to_dict() for m in measured}
        (out / "comparison.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        names.append("comparison.json")
    console.print(
        f"Written to {out}: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True
    )
