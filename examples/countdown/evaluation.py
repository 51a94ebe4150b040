"""Both models on problems they have never seen, with the package's own generation."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from task import OPERATORS, Problem, apply, draw, first_pairs, reachable, verify
from traces import answer_of
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fork_attn import reason

BATCH = 50  # problems in one ragged batch
SEED = 7919  # of held-out problems; recipes of training were compared on others
TOKEN_BUDGET = 512  # sampled tokens of all threads together, the same for both models


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
    seconds: float | None = None  # alone on the machine, where that was measured


def held_out(count: int, seed: int) -> list[Problem]:
    """Different problems out of the sets of numbers kept for this."""
    rng = random.Random(SEED + seed)
    found: dict[Problem, None] = {}
    while len(found) < count:
        found.setdefault(draw(rng, held_out=True))
    return list(found)


def solve(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> list[reason.Trace]:
    """Greedy generation in Multiverse's protocol, all problems in one ragged batch.

    A model that writes no tags just writes.
    """
    return reason.generate(
        model,
        tokenizer,
        [" ".join(problem.words) for problem in problems],
        protocol="multiverse",
        sampling=GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id),
        limits=reason.Limits(max_new_tokens=TOKEN_BUDGET),
    )


def judge(problem: Problem, trace: reason.Trace) -> Outcome:
    forks = trace.events_of("fork")
    return Outcome(
        problem=" ".join(problem.words),
        right=verify(problem, answer_of(trace.text.split())),
        finished=trace.finish == "done",
        threads=len(forks[0].others) if forks else 0,
        pairs=len(first_pairs(problem.numbers)),
        total_tokens=trace.total_tokens,
        critical_path_tokens=trace.critical_path_tokens,
    )


def evaluate(
    models: dict[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    timed: int,
    on_problem: Callable[[], None],
) -> dict[str, list[Outcome]]:
    """Every problem by every model in batches; the first `timed` ones also one at a time.

    When timed, the models take turns, so that a slow moment of the machine hits both.
    """
    found: dict[str, list[Outcome]] = {}
    for name, model in models.items():
        found[name] = []
        for start in range(0, len(problems), BATCH):
            batch = problems[start : start + BATCH]
            traces = solve(model, tokenizer, batch)
            found[name] += map(judge, batch, traces)
        on_problem()
    for i, problem in enumerate(problems[:timed]):
        for name, model in models.items():
            (trace,) = solve(model, tokenizer, [problem])
            found[name][i] = replace(found[name][i], seconds=trace.seconds)
        on_problem()
    return found


def within(outcomes: Sequence[Outcome], field: str, budget: float) -> float:
    """The share that is solved, and takes at most `budget` of something."""
    known = [o for o in outcomes if getattr(o, field) is not None]
    return sum(o.right and getattr(o, field) <= budget for o in known) / len(known)


def interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share of `count` independent problems (Wilson, 1927)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def baselines(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What is solved with no search: by `none` every time, and by one of all solutions that the
    game allows, drawn at random, which is an expectation.
    """
    problems = [Problem.parse(outcome.problem) for outcome in outcomes]
    none = statistics.mean(p.target not in reachable(p.numbers) for p in problems)
    return {"always `none`": none, "a random try": statistics.mean(map(_random_try, problems))}


def _random_try(problem: Problem) -> float:
    results: list[int] = []
    for pair, rest in first_pairs(problem.numbers):
        for first in OPERATORS:
            result = apply(first, *pair)
            if result is None:
                continue
            values = [apply(second, result, c) for c in rest for second in OPERATORS]
            results += [result, *(value for value in values if value is not None)]
    return results.count(problem.target) / len(results)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A model's row of the table."""
    forked = [o for o in outcomes if o.threads]
    seconds = [o.seconds for o in outcomes if o.seconds is not None]
    return {
        "problems": len(outcomes),
        "accuracy": (accuracy := within(outcomes, "total_tokens", TOKEN_BUDGET)),
        "accuracy_interval": interval(accuracy, len(outcomes)),
        "total_tokens": statistics.mean(o.total_tokens for o in outcomes),
        "critical_path_tokens": statistics.mean(o.critical_path_tokens for o in outcomes),
        "critical_path_tokens_p95": percentile([o.critical_path_tokens for o in outcomes], 0.95),
        "timed": len(seconds),
        "milliseconds": 1e3 * statistics.mean(seconds),
        "milliseconds_p95": 1e3 * percentile(seconds, 0.95),
        "forked": len(forked) / len(outcomes),
        "forks": forks(outcomes),
    }


def forks(outcomes: Sequence[Outcome]) -> list[dict[str, int]]:
    """For each number of pairs: how many problems, how many forked, how many with the right width,
    which for one pair is no fork, and how many solved.
    """
    rows = []
    for pairs in sorted({o.pairs for o in outcomes}):
        own = [o for o in outcomes if o.pairs == pairs]
        rows.append({
            "pairs": pairs,
            "problems": len(own),
            "forked": sum(o.threads > 0 for o in own),
            "right_width": sum(o.threads == (pairs if pairs > 1 else 0) for o in own),
            "solved": sum(o.right for o in own),
        })  # fmt: skip
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def as_json(found: dict[str, list[Outcome]]) -> dict[str, Any]:
    return {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in found.items()}
