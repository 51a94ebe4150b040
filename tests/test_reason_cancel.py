"""Generations that are cut off, by whom and when ever, free everything."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from reason_pair import (
    PROMPT,
    SAMPLED,
    assert_free,
    attached,
    check_trace,
    make_model,
    make_tokenizer,
)
from transformers import GenerationConfig

from fork_attn import hf
from fork_attn.reason import (
    Finished,
    Limits,
    generate,
    stream,
)
from fork_attn.reason.sampling import Sampler
from fork_attn.reason.systems import BestOfN, TagProtocol

pytestmark = pytest.mark.usefixtures("one_thread")


def events_until(n: int, events: Iterator[Any]) -> None:
    for _, _event in zip(range(n), events, strict=False):
        pass


def test_a_closed_stream_frees_everything() -> None:
    model, tokenizer, cache = attached()
    events = stream(model, tokenizer, [PROMPT] * 3, protocol="best_of_n", sampling=SAMPLED)
    events_until(30, events)
    assert cache.stats().pages_live > 0
    events.close()  # type: ignore[attr-defined]
    assert_free(cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_error_inside_the_model_frees_everything(error: type[BaseException]) -> None:
    model, tokenizer, cache = attached()
    calls = 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise error

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        generate(model, tokenizer, [PROMPT] * 2, protocol="best_of_n", sampling=SAMPLED)
    assert_free(cache)
    handle.remove()
    generate(model, tokenizer, PROMPT, protocol="best_of_n", sampling=SAMPLED)


def test_interrupts_free_everything() -> None:
    """Ctrl-C, at whatever moment it comes."""
    model, tokenizer, cache = attached()
    rng = random.Random(0)
    caught = 0
    for _ in range(12):
        timer = threading.Timer(rng.uniform(0.0, 0.2), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            for _ in range(100):
                generate(model, tokenizer, [PROMPT] * 2, protocol="best_of_n", sampling=SAMPLED)
                if not timer.is_alive():
                    break
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            caught += 1
        assert_free(cache)
    assert caught == 12


def test_an_error_of_a_scorer_frees_everything() -> None:
    def scorer(text: str) -> float:
        raise ZeroDivisionError

    model, tokenizer, cache = attached()
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, PROMPT, protocol=BestOfN(scorer=scorer), sampling=SAMPLED)
    assert_free(cache)


class _Tags(TagProtocol):
    """Characters as tags, so that a random model forks, nests and errs all the time."""


CHAOS = _Tags(
    name="chaos",
    opens="a",
    item="b",
    fork_at="c",
    child_ends="d",
    fanout=2,
    header="x",
    closing="d",
    after="y",
)


class _Random(Sampler):
    """Draws tags half of the time; ignores logits."""

    def __init__(self, vocab: int, seed: int) -> None:
        super().__init__(GenerationConfig())
        self._rng, self._vocab = random.Random(seed), vocab

    def changed(self, **options: Any) -> Sampler:
        return self

    def pick(self, logits: Any, threads: Any) -> tuple[list[int], list[float]]:
        ids = [
            self._rng.choice((1, 2, 3, 4))
            if self._rng.random() < 0.5
            else 0
            if self._rng.random() < 0.05
            else self._rng.randrange(5, self._vocab)
            for _ in threads
        ]
        return ids, [-1.0] * len(ids)


def test_a_thousand_cancelled_generations_leak_nothing() -> None:
    """Random trees over tight pools, cut off at random events, joined by text or union."""
    from dataclasses import replace

    from fork_attn.reason.job import Job

    tokenizer = make_tokenizer()
    model = make_model(
        tokenizer,
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    cache = hf.attach(model, num_pages=40, page_size=4)
    rng = random.Random(0)
    kinds = [CHAOS, replace(CHAOS, join="text"), replace(CHAOS, position="sum"), "first_finish"]
    finishes: dict[str, int] = {}
    for i in range(1000):
        limits = Limits(
            max_new_tokens=rng.choice((10, 60)),
            max_thread_tokens=rng.choice((None, 5)),
            max_depth=rng.choice((1, 3)),
            max_pages=rng.choice((None, 20)),
        )
        prompts = ["go"] * rng.choice((1, 1, 3))
        job = Job(model, tokenizer, prompts, kinds[i % 4], None, GenerationConfig(), limits, i)
        job.samplers = [_Random(len(tokenizer), i + k) for k in range(len(prompts))]
        events = job.events(tokens=True)
        for event, _ in zip(events, range(rng.choice((1, 5, 20, 60, 10_000))), strict=False):
            if isinstance(event, Finished):
                finishes[event.trace.finish] = finishes.get(event.trace.finish, 0) + 1
                if i % 10 == 0:
                    check_trace(event.trace)
        events.close()  # type: ignore[attr-defined]
        assert cache.stats().pages_live == 0 and cache.stats().branches == 0
    cache.check()
    assert finishes["done"] > 50 and finishes["limit"] > 50
