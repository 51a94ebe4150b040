"""Speculative decoding inside threads: limits, cancellation, reports and refusals."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from draft_pair import (
    TAGS,
    TAGS_OFF,
    Peek,
    assert_free,
    drafters,
    few_tokens,
    plain_and_drafted,
)
from reason_pair import EOS, Forced, check_trace, make_model, make_tokenizer, run_forced
from transformers import GenerationConfig

from fork_attn import Unsupported, hf
from fork_attn.reason import (
    CustomGenerate,
    DraftModel,
    Finished,
    Limits,
    PromptLookup,
    Protocol,
    Span,
    Thread,
    TokenEvent,
    generate,
    stream,
    together,
    trace_show,
)
from fork_attn.reason.drafts import DraftTree
from fork_attn.reason.records import Log
from fork_attn.reason.run import Run
from fork_attn.reason.systems import BestOfN

pytestmark = pytest.mark.usefixtures("one_thread")


SERIAL = "ab" * 40 + EOS


@pytest.mark.parametrize(
    ("limits", "options"),
    [
        (Limits(max_new_tokens=13), {}),
        (Limits(max_thread_tokens=13), {}),
        (Limits(max_pages=7), {}),
        (Limits(), {"num_pages": 8}),
        (Limits(), {"max_position_embeddings": 32}),
    ],
    ids=["max_new_tokens", "max_thread_tokens", "max_pages", "pool", "positions"],
)
@pytest.mark.parametrize("most", [1, 2, 5, 6])
def test_a_thread_ends_at_its_limits_as_it_did(
    limits: Limits, options: dict[str, int], most: int
) -> None:
    tokenizer = make_tokenizer("multiverse")
    cache_options = dict(options)
    config = {k: cache_options.pop(k) for k in ("max_position_embeddings",) if k in cache_options}
    model = make_model(tokenizer, **config)
    forced = Forced({(): tokenizer.encode(SERIAL)})
    (trace,) = plain_and_drafted(
        model, tokenizer, "Is 91 prime?", "multiverse", forced, limits=limits,
        speculation=Peek(most=most, lies=0.0), **cache_options,
    )  # fmt: skip
    assert trace.accepted_tokens > 0 and "limit" in (trace.finish, trace.root.status)
    check_trace(trace)


def test_limits_of_many_threads_hold() -> None:
    tokenizer = make_tokenizer()
    script = {((1, i),): tokenizer.encode("abc" * 30 + EOS) for i in range(4)}
    for limits in (Limits(max_new_tokens=30), Limits(max_pages=16), Limits(max_seconds=1e-9)):
        (trace,) = run_forced(
            make_model(tokenizer), tokenizer, "Is 91 prime?", BestOfN(n=4), Forced(script),
            limits=limits, speculation=Peek(),
        )  # fmt: skip
        assert trace.total_tokens <= 33 or limits.max_pages is not None
        assert all(step.pages_live <= (limits.max_pages or 99) for step in trace.steps)
        assert trace.events_of("limit")
        check_trace(trace)


def test_a_draft_model_without_room_leaves_threads_without_drafts() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    draft = copy.deepcopy(model)
    hf.attach(model, num_pages=256, page_size=4)
    hf.attach(draft, num_pages=12, page_size=4)
    call = {"protocol": BestOfN(n=4), "sampling": few_tokens(model, max_new_tokens=30)}
    want = generate(model, tokenizer, "Is 91 prime?", **call)
    got = generate(model, tokenizer, "Is 91 prime?", speculation=DraftModel(draft), **call)
    notes = [thread.note for thread in got.threads]
    assert "no more drafts: the draft model's pool is full" in notes
    assert [t.token_ids for t in got.threads] == [t.token_ids for t in want.threads]
    assert got.accepted_tokens > 0
    assert_free(model, draft)


# --- leaks


def test_cancelled_generations_leak_nothing() -> None:
    """Random trees, tight pools of both models, cut off at random events."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    speculations = drafters(model)
    hf.attach(model, num_pages=40, page_size=4)
    rng = random.Random(0)
    models = [s.model for s in speculations.values() if isinstance(s, DraftModel)]
    finishes: set[str] = set()
    for i in range(60):
        name = list(speculations)[i % 3]
        limits = Limits(max_new_tokens=rng.choice((10, 60)), max_pages=rng.choice((None, 20)))
        events = stream(
            model, tokenizer, ["go"] * rng.choice((1, 3)), protocol=rng.choice((TAGS, "best_of_n")),
            sampling=few_tokens(model), limits=limits, seed=i, speculation=speculations[name],
        )  # fmt: skip
        for event, _ in zip(events, range(rng.choice((1, 5, 20, 60, 10_000))), strict=False):
            if isinstance(event, Finished):
                finishes.add(event.trace.finish)
        events.close()
        assert_free(model, *models)
    assert finishes == {"done", "limit"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("which", ["target", "draft"])
def test_an_error_inside_either_model_frees_both(which: str, error: type[BaseException]) -> None:
    tokenizer = make_tokenizer()
    model, draft = make_model(tokenizer), make_model(tokenizer)
    for one in (model, draft):
        hf.attach(one, num_pages=256, page_size=4)
    calls = 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise error

    broken = {"target": model, "draft": draft}[which]
    broken.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        generate(
            model, tokenizer, ["one", "two"], protocol="best_of_n", sampling=few_tokens(model),
            speculation=DraftModel(draft),
        )  # fmt: skip
    assert_free(model, draft)


# --- reports, streams and transformers' generate


def test_a_stream_and_custom_generate() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = EOS
    model = make_model(tokenizer)
    hf.attach(model, num_pages=256, page_size=4)
    speculation = PromptLookup(min_ngram=1)
    sampling = GenerationConfig(do_sample=False, max_new_tokens=40)
    events = list(
        stream(
            model, tokenizer, "abcabcab", protocol=TAGS_OFF, sampling=sampling,
            speculation=speculation,
        )
    )  # fmt: skip
    trace = events[-1].trace  # type: ignore[union-attr]
    told = [event.token_id for event in events if isinstance(event, TokenEvent)]
    assert tuple(told) == trace.token_ids and trace.accepted_tokens > 0
    assert f"{trace.steps_saved} steps saved" in trace_show.summary(trace)
    assert trace.speculation == {
        "method": "PromptLookup", "num_tokens": 8, "candidates": 2, "max_ngram": 3, "min_ngram": 1,
    }  # fmt: skip
    ids = torch.tensor([tokenizer.encode("abcabcab")])
    loop = CustomGenerate(tokenizer, TAGS_OFF, speculation=speculation)
    got = model.generate(ids, custom_generate=loop, max_new_tokens=40, do_sample=False)
    assert got[0].tolist() == [*trace.prompt_ids, *trace.token_ids]
    assert loop.traces[0].steps_saved == trace.steps_saved > 0


def test_lookup_finds_what_came_before() -> None:
    """In the thread's own text, across a fork, and in what siblings wrote."""
    drafter = PromptLookup(num_tokens=4, candidates=2).drafter(None, None, 0)  # type: ignore[arg-type]
    root = Log(0, "root", "", (), (), 0, 0)
    root.token_ids = [1, 2, 3, 4, 5, 1, 2, 9, 8, 1]
    child, sibling = (Log(i, "thread", "", (0,), (Span(0, 0, 10),), 1, 0) for i in (1, 2))
    run: Any = Run.__new__(Run)
    run.logs = [root, child, sibling]

    def tree(log: Log, most: int = 8) -> list[tuple[int, int]]:
        thread = Thread.__new__(Thread)
        thread.run, thread.log = run, log
        found = drafter.propose({thread: most}).get(thread, DraftTree())
        return list(zip(found.tokens, found.parents, strict=True))

    child.token_ids, sibling.token_ids = [2], [6, 7]
    # 1, 2 was followed by 9, 8, 1 | 2 and by 3, 4, 5, 1; the latest comes first.
    assert tree(child) == [(9, -1), (8, 0), (1, 1), (3, -1), (4, 3), (5, 4), (1, 5)]
    assert tree(child, most=1) == [(9, -1), (3, -1)]
    assert tree(sibling) == []
    child.token_ids += [6, 7]
    sibling.token_ids += [5, 5]
    assert tree(child) == [(5, -1), (5, 0)]
    # A text that repeats itself goes on to: the draft is longer than what there is to copy.
    sibling.token_ids += [3, 4, 3, 4, 3, 4]
    assert tree(sibling)[:4] == [(3, -1), (4, 0), (3, 1), (4, 2)]


# --- errors


def test_what_is_refused() -> None:
    tokenizer = make_tokenizer("hogwild")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = make_model(tokenizer)
    cache = hf.attach(model, num_pages=64)
    smaller = make_model(make_tokenizer("hogwild", extra=["<more>"]))
    short = make_model(tokenizer, max_position_embeddings=16)

    def call(speculation: Any, protocol: Any = "multiverse", prompt: str = "Hm" * 20) -> None:
        generate(model, tokenizer, prompt, protocol=protocol, speculation=speculation)

    plain = TAGS_OFF
    for name in ("hogwild", "groupthink"):
        with pytest.raises(Unsupported, match=f"speculation: .*'{name}' see each other's tokens"):
            call(PromptLookup(), name)
    with pytest.raises(TypeError, match=r"speculation: expected PromptLookup, .*, got str"):
        call("lookup", plain)
    with pytest.raises(ValueError, match="speculation: expected a draft model, got the model that"):
        call(DraftModel(model), plain)
    vocab = len(tokenizer)
    with pytest.raises(ValueError, match=f"with the {vocab} token ids of .* with {vocab + 1}"):
        call(DraftModel(smaller), plain)
    with pytest.raises(ValueError, match=r"prompts of fewer than the 16 tokens.*, got 40"):
        call(DraftModel(short), plain)
    moved = make_model(tokenizer, "gpt2", n_positions=256)
    with pytest.raises(Unsupported, match="speculation: protocol 'drafted tags' moves tokens"):
        call(DraftModel(moved), replace(TAGS, join="rebase"))
    with pytest.raises(TypeError, match="model: expected a PreTrainedModel, got str"):
        DraftModel("gpt2")  # type: ignore[arg-type]
    for name in ("num_tokens", "candidates", "max_ngram", "min_ngram"):
        with pytest.raises(ValueError, match=f"{name}: expected 1 to"):
            PromptLookup(**{name: 0})
    with pytest.raises(TypeError, match="num_tokens: expected an int, got float"):
        DraftModel(smaller, num_tokens=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_ngram: expected at most max_ngram=3, got 4"):
        PromptLookup(min_ngram=4)
    cache.backend = "flash_attn"
    with pytest.raises(Unsupported, match="backend 'flash_attn' has no draft trees"):
        call(PromptLookup(), plain)
    cache.backend = "cpu"
    assert_free(model)


@dataclass(frozen=True)
class _Watchers(Protocol):
    name: str = "undeclared watchers"

    def run(self, root: Any) -> Any:
        one, other = yield from root.fork(2)
        one.watch(other)
        yield from together([one.write(), other.write()])


def test_a_protocol_that_watches_unannounced_is_refused() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    hf.attach(model, num_pages=64)
    with pytest.raises(Unsupported, match="watch: a thread that drafts tokens"):
        generate(model, tokenizer, "Hm", protocol=_Watchers(), speculation=PromptLookup())
    assert_free(model)
