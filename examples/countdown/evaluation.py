"""Both models on problems they have never seen, with the package's own generation."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from task import Problem, draw, first_pairs, verify
from traces import answer_of
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fork_attn import reason

TOKEN_BUDGET = 320  # sampled tokens of all threads together, the same for both models


@dataclass(frozen=True)
class Outcome:
    """One problem by one model."""

    problem: str
    right: bool
    finished: bool
    threads: int  # of its first fork; 0: it did not fork
    pairs: int  # that could be put together first
    total_tokens: int
    critical_path_tokens: int
    seconds: float


def held_out(count: int, seed: int) -> list[Problem]:
    """Different problems out of the sets of numbers kept for this."""
    rng = random.Random(seed)
    found: dict[Problem, None] = {}
    while len(found) < count:
        found.setdefault(draw(rng, held_out=True))
    return list(found)


def solve(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problem: Problem
) -> tuple[Outcome, reason.Trace]:
    """Greedy generation in Multiverse's protocol; a model that writes no tags just writes."""
    trace = reason.generate(
        model,
        tokenizer,
        " ".join(problem.words),
        protocol="multiverse",
        sampling=GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id),
        limits=reason.Limits(max_new_tokens=TOKEN_BUDGET),
    )
    forks = trace.events_of("fork")
    outcome = Outcome(
        problem=" ".join(problem.words),
        right=verify(problem, answer_of(trace.text.split())),
        finished=trace.finish == "done",
        threads=len(forks[0].others) if forks else 0,
        pairs=len(first_pairs(problem.numbers)),
        total_tokens=trace.total_tokens,
        critical_path_tokens=trace.critical_path_tokens,
        seconds=trace.seconds,
    )
    return outcome, trace


def evaluate(
    models: dict[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    on_problem: Callable[[], None],
) -> dict[str, list[Outcome]]:
    """Every problem by every model, in turn, so that a slow moment of the machine hits both."""
    for model in models.values():
        solve(model, tokenizer, problems[0])  # the first call of all pays for imports
    found: dict[str, list[Outcome]] = {name: [] for name in models}
    for problem in problems:
        for name, model in models.items():
            found[name].append(solve(model, tokenizer, problem)[0])
        on_problem()
    return found


def within(outcomes: Sequence[Outcome], field: str, budget: float) -> float:
    """The share that is solved, and takes at most `budget` of something."""
    return sum(o.right and getattr(o, field) <= budget for o in outcomes) / len(outcomes)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A model's row of the table."""
    forked = [o for o in outcomes if o.threads]
    return {
        "problems": len(outcomes),
        "accuracy": within(outcomes, "total_tokens", TOKEN_BUDGET),
        "total_tokens": statistics.mean(o.total_tokens for o in outcomes),
        "critical_path_tokens": statistics.mean(o.critical_path_tokens for o in outcomes),
        "critical_path_tokens_p95": percentile([o.critical_path_tokens for o in outcomes], 0.95),
        "milliseconds": 1e3 * statistics.mean(o.seconds for o in outcomes),
        "milliseconds_p95": 1e3 * percentile([o.seconds for o in outcomes], 0.95),
        "forked": len(forked) / len(outcomes),
        "forked_as_wide_as_the_problem": (
            sum(o.threads == (o.pairs if o.pairs > 1 else 0) for o in outcomes) / len(outcomes)
        ),
    }


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def as_json(found: dict[str, list[Outcome]]) -> dict[str, Any]:
    return {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in found.items()}
