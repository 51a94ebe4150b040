"""Generations with drafts beside the same ones without: what must not differ, and a drafter that
knows what a script will say and lies now and then."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from reason_pair import Forced, make_model, make_tokenizer, run_forced
from transformers import GenerationConfig

from fork_attn import ForkedKVCache, hf
from fork_attn.reason import DraftModel, Limits, PromptLookup, Speculation, Thread, Trace
from fork_attn.reason.drafts import Drafter, DraftTree
from fork_attn.reason.systems import TagProtocol

# Characters as tags, so that a random model forks, nests and errs all the time.
TAGS = TagProtocol(
    name="drafted tags", fork_at="c", child_ends="d", fanout=2, header="x", closing="d", after="y",
)  # fmt: skip
TAGS_OFF = replace(TAGS, name="no tags", fork_at="z", child_ends="z")
LIMITS = Limits(max_thread_tokens=10, max_depth=2)


class Peek(Speculation):
    """Drafts what `Forced` will pick, with wrong siblings, and wrong tokens in its middle."""

    def __init__(self, seed: int = 0, most: int = 6, lies: float = 0.3) -> None:
        self.seed, self.most, self.lies = seed, most, lies

    def drafter(self, *args: Any) -> Drafter:
        return _Peeking(self)


class _Peeking(Drafter):
    def __init__(self, peek: Peek) -> None:
        self._peek, self._rng = peek, random.Random(peek.seed)

    def propose(self, wanted: Mapping[Thread, int]) -> dict[Thread, DraftTree]:
        trees = {}
        for thread, most in wanted.items():
            forced: Any = thread.sampler
            done = forced.count.get(thread.path, 0)
            rest = forced.script[thread.path][done : done + min(most, self._peek.most)]
            tree, node = DraftTree(), -1
            for token in rest:
                if self._rng.random() < self._peek.lies:
                    tree.add((token + 1) % 7, node)
                if self._rng.random() < self._peek.lies / 2:
                    node = tree.add((token + 2) % 7, node)
                    continue
                node = tree.add(token, node)
            if len(tree):
                trees[thread] = tree
        return trees


def plain_and_drafted(
    model: Any, tokenizer: Any, prompts: Any, protocol: Any, forced: Any, **options: Any
) -> list[Trace]:
    """`run_forced` with drafts, held against a run without; the traces of the one with drafts."""
    samplers = forced if isinstance(forced, list) else [forced]
    speculation = options.pop("speculation", Peek())
    fresh = [Forced(sampler.script) for sampler in samplers]
    plain = run_forced(copy.deepcopy(model), tokenizer, prompts, protocol, fresh, **options)
    drafted = run_forced(
        model, tokenizer, prompts, protocol, forced, speculation=speculation, **options
    )
    for want, got in zip(plain, drafted, strict=True):
        assert_same(want, got)
        off = got.steps_saved - (len(want.steps) - len(got.steps))
        assert off == 0 or (off == 1 and got.protocol in ("apar", "pasta")), (
            f"{got.steps_saved} steps saved, {len(want.steps)} steps became {len(got.steps)}"
        )
    return drafted


def story(trace: Trace) -> dict[str, Any]:
    """A trace without times and steps, and without the order in which records were numbered: which
    of two threads forks first may depend on drafts."""
    count: Counter[int] = Counter()
    names: dict[int | None, Any] = {None: None}
    for thread in trace.threads:
        names[thread.id] = (thread.seed, count[thread.seed])
        count[thread.seed] += 1

    def spans(given: Any) -> list[Any]:
        return [(names[span.thread], span.start, span.end) for span in given]

    threads = {
        names[t.id]: (
            t.kind, t.label, [names[p] for p in t.parents], spans(t.context), t.depth, t.token_ids,
            t.positions, t.status, t.note, t.text,
            [(i.start, i.end, i.kind, names[i.source]) for i in t.injections],
        )
        for t in trace.threads
    }  # fmt: skip
    events = sorted(
        str((e.kind, names[e.thread], [names[o] for o in e.others], names[e.into], e.join,
             e.position, e.tokens_reused, e.note))
        for e in trace.events
    )  # fmt: skip
    return {
        "threads": threads,
        "events": events,
        "answer": spans(trace.answer),
        "final": names[trace.final],
        "finish": trace.finish,
    }


def assert_same(want: Trace, got: Trace) -> None:
    """Both say the same, with the same log-probabilities."""
    assert story(got) == story(want)
    by_seed = [sorted(trace.threads, key=lambda t: (t.seed, t.id)) for trace in (want, got)]
    for one, other in zip(*by_seed, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def few_tokens(model: Any, **options: Any) -> GenerationConfig:
    """Sampling from the end token and sixteen characters alone."""
    rest = list(range(17, model.config.vocab_size))
    return GenerationConfig(**{"do_sample": True, "suppress_tokens": rest, **options})


def drafters(model: Any) -> dict[str, Speculation]:
    other = make_model(make_tokenizer(), num_hidden_layers=1, hidden_size=32)
    for draft in (same := copy.deepcopy(model), other):
        hf.attach(draft, num_pages=256, page_size=4)
    return {
        "lookup": PromptLookup(num_tokens=5, candidates=3, min_ngram=1),
        "same model": DraftModel(same, num_tokens=3),
        "other model": DraftModel(other, num_tokens=3, candidates=3),
    }


def assert_free(*models: Any) -> None:
    for model in models:
        cache: ForkedKVCache = hf._link.link_of(model).cache
        assert cache.stats().pages_live == 0 and cache.branches == ()
        cache.check()
