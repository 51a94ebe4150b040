"""The trace of a run that is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fork_attn.reason.run import Run
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import Event, StepRecord


def build_trace(
    run: Run, model_name: str, steps: Sequence[StepRecord], speculation: dict[str, Any]
) -> Trace:
    """The trace of a completed run.

    Args:
        run: the run.
        model_name: for people.
        steps: of the engine, from the run's first on.
        speculation: `Speculation.facts`.
    """
    fed = [step for log in run.logs for step in log.fed_steps if step is not None]
    last = max(fed, default=run.first_step - 1) + 1
    mine = _own_steps(run, steps[: last - run.first_step])
    shift = run.first_step
    return Trace(
        protocol=run.protocol.name,
        model=model_name,
        prompt=run.prompt,
        prompt_ids=tuple(run.prompt_ids),
        threads=tuple(log.build(run.vocabulary.pieces, shift) for log in run.logs),
        events=tuple(_shifted(event, shift) for event in run.events),
        steps=mine,
        answer=run.answer,
        final=run.final,
        finish=run.finish or "cancelled",
        seed=run.seed,
        sampling=_plain(run.sampler.config.to_diff_dict()),
        limits=asdict(run.limits),
        speculation=speculation,
        page_size=run.cache.page_size,
        pages_shared=run.pages_shared,
    )


def _shifted(event: Event, by: int) -> Event:
    return replace(event, step=max(event.step - by, 0))


def _own_steps(run: Run, steps: Sequence[StepRecord]) -> tuple[StepRecord, ...]:
    """Steps with width, tokens and drafts of one run alone."""
    first = run.first_step
    width, tokens, accepted = ([0] * len(steps) for _ in range(3))
    for log in run.logs:
        fed = Counter(step - first for step in log.fed_steps if step is not None)
        for step, count in fed.items():
            width[step] += 1
            tokens[step] += count
        for took, gave in zip(log.fed_steps, log.sampled_steps, strict=False):
            if took is not None and took == gave:
                accepted[took - first] += 1
    mine: list[StepRecord] = []
    for i, record in enumerate(steps):
        drafts, drafted = run.drafted.get(first + i, (0, 0))
        counts = {"drafts": drafts, "drafted": drafted, "accepted": accepted[i]}
        mine.append(replace(record, width=width[i], tokens=tokens[i], **counts))
    return tuple(mine)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a config, without versions."""
    keep = (str, int, float, bool, list, type(None))
    skip = ("transformers_version", "_from_model_config")
    return {k: v for k, v in config.items() if k not in skip and isinstance(v, keep)}
