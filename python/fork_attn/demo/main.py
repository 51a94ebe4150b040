"""What `fork-attn demo` does, in order."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import fork_attn.hf as hf
from fork_attn import Branch
from fork_attn.demo import baseline, facts, picture, report, trace, weights
from fork_attn.demo.compare import METHODS, ROUNDS, Measured, compare
from fork_attn.demo.decode import Sampling, Watch
from fork_attn.demo.progress import Reporter
from fork_attn.demo.session import Session
from fork_attn.demo.threads import PROMPT, Script, think, write_script

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

    console.rule("Four threads think about one prompt, and join", align="left")
    record, measured = _think(
        reporter, session, stock, script, Sampling(args.temperature, args.seed)
    )
    console.print()
    report.print_tree(console, record)
    console.rule("What it took", align="left")
    report.print_path(console, record)
    if measured:
        report.print_comparison(console, measured, record)

    trace.save(record, args.out / "trace.json")
    (args.out / "tree.svg").write_text(picture.draw(record), encoding="utf-8")
    console.print(
        f"Written: {args.out / 'trace.json'} and the picture {args.out / 'tree.svg'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    _print_score(console, answers)
    return 0 if answers.passed else 1


def _write(
    reporter: Reporter, session: Session, root: Branch, script: Script, sampling: Sampling
) -> trace.Trace:
    """Threads, join and conclusion, shown as they grow."""
    n = len(script.openings)
    with ExitStack() as shown:
        threads = reporter.texts(
            f"{n} threads in one batch",
            script.openings,
            session.decode,
            script.thread_ending.max_tokens,
        )

        def on_join() -> Watch:
            shown.close()
            conclusion = shown.enter_context(
                reporter.texts(
                    "the conclusion",
                    [script.closing.strip()],
                    session.decode,
                    script.conclusion_ending.max_tokens,
                )
            )
            return lambda _, token_ids: conclusion(0, token_ids)

        return think(session, root, script, sampling, shown.enter_context(threads), on_join)


def _print_score(console: Console, answers: facts.Answers) -> None:
    n = len(answers.facts)
    joined, alone = answers.score(answers.with_join), answers.score(answers.without_join)
    style = "bold green" if answers.passed else "bold red"
    console.print(f"[{style}]Facts known: {joined}/{n} with the join, {alone}/{n} without.[/]")


def _think(
    reporter: Reporter,
    session: Session,
    stock: PreTrainedModel | None,
    script: Script,
    sampling: Sampling,
) -> tuple[trace.Trace, list[Measured]]:
    root = session.cache.new_branch()
    with reporter.phase(f"reading the prompt, {len(script.prompt_ids)} tokens"):
        session.forward({root: script.prompt_ids})
    record = _write(reporter, session, root, script, sampling)
    measured: list[Measured] = []
    if stock is not None:
        with reporter.phase(
            "the same again, beside stock transformers", ROUNDS * len(METHODS)
        ) as at:
            measured = compare(
                session, stock, root, script, sampling,
                on_round=lambda method, number: at(f"round {number + 1} of {ROUNDS}: {method}"),
            )  # fmt: skip
        record = replace(record, measurements={m.method: m.to_dict() for m in measured})
    session.cache.free([root])
    return record, measured
