"""The engine: prompts side by side, limits, full pools, sampling."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from reason_pair import (
    EOS,
    PROMPT,
    SAMPLED,
    TOLERANCE,
    Dense,
    Forced,
    assert_free,
    attached,
    check_trace,
    make_model,
    make_tokenizer,
    run_forced,
)
from transformers import GenerationConfig

from fork_attn import hf
from fork_attn.reason import (
    CustomGenerate,
    Finished,
    Limits,
    ThreadEvent,
    TokenEvent,
    Trace,
    generate,
    protocols,
    stream,
)
from fork_attn.reason.sampling import Sampler
from fork_attn.reason.systems import BestOfN

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(trace: Trace) -> list[tuple[int, ...]]:
    return [thread.token_ids for thread in trace.threads]


# --- prompts side by side


def test_prompts_in_one_batch_are_exact() -> None:
    """A serial, a forking and a joining prompt share their forwards."""
    tokenizer = make_tokenizer("multiverse")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    head = "<Goal><Outline>1:a</Outline><Outline>2:b</Outline></Goal>"
    prompts = ["One?", "Two two?", "Three?"]
    heads = ["serial " * 12 + EOS, head, "wait" + head]
    samplers = [Forced({(): ids(heads[0])})]
    for i in (1, 2):
        paths = {((1, 0),): ids("left" * i + "</Path>"), ((1, 1),): ids("r</Path>")}
        samplers.append(Forced({(): ids(heads[i] + "so" + EOS), **paths}))
    dense = [Dense(model) for _ in prompts]
    traces = run_forced(model, tokenizer, prompts, "multiverse", samplers)
    for i, (trace, forced) in enumerate(zip(traces, samplers, strict=True)):
        assert forced.used_up
        check_trace(trace)
        d = dense[i]
        seen = d.give(ids(prompts[i]), 0, [])
        if i == 0:
            d.sample((), ids(heads[0]), len(seen), seen, fed=False)
        else:
            seen = d.sample((), ids(heads[i]), len(seen), seen)
            seen = d.give(ids("\n"), len(seen), seen)
            union, end = list(seen), 0
            for k in range(2):
                line = d.give(ids(f"<Path>\n{k + 1}:"), len(seen), seen)
                line = d.sample(((1, k),), forced.script[((1, k),)], len(line), line)
                union += line[len(seen) :]
                end = max(end, len(line))
            line = d.give(ids("<Conclusion>\n"), end, union)
            at = end + len(ids("<Conclusion>\n"))
            d.sample((), ids("so" + EOS), at, line, fed=False)
        assert d.max_error(forced) <= TOLERANCE
    widest = max(range(len(traces[1].steps)), key=lambda s: traces[1].steps[s].width)
    assert traces[0].steps[widest].width == 1  # the serial prompt ran in the same step


def test_a_prompt_alone_and_in_a_batch_is_the_same() -> None:
    model, tokenizer, cache = attached()
    options = {"protocol": BestOfN(n=3), "sampling": SAMPLED}
    together = generate(model, tokenizer, ["abc", "x = 1;", "no"], seed=5, **options)
    alone = generate(model, tokenizer, "x = 1;", seed=6, **options)
    assert tokens_of(together[1]) == tokens_of(alone)
    assert len(set(tokens_of(alone)[1:])) == 3  # each thread draws for itself
    again = generate(model, tokenizer, "x = 1;", seed=6, **options)
    other = generate(model, tokenizer, "x = 1;", seed=7, **options)
    assert tokens_of(again) == tokens_of(alone) != tokens_of(other)
    assert_free(cache)


def test_greedy_serial_generation_equals_transformers() -> None:
    tokenizer = make_tokenizer("multiverse")
    model = make_model(tokenizer)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    want = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
    hf.attach(model, num_pages=64)
    trace = generate(
        model, tokenizer, PROMPT, protocol="multiverse", limits=Limits(max_new_tokens=30)
    )
    assert list(trace.token_ids) == want


# --- sampling


class _Thread:
    """What a sampler needs of a thread."""

    def __init__(self, seed: int, context: list[int]) -> None:
        self.rng, self._context = random.Random(seed), context

    def context_ids(self) -> list[int]:
        return self._context


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1, "temperature": 1.5},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [3, 4]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sampling_has_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    config = GenerationConfig(do_sample=True, **options)
    vocab, context = 12, [1, 5, 1, 5, 7, 1]
    torch.manual_seed(0)
    logits = torch.randn(1, vocab) * 2
    model = make_model(make_tokenizer())
    processors = model._get_logits_processor(
        config,
        len(context),
        torch.tensor([context]),
        device="cpu",
        model_kwargs={},
        logits_processor=transformers.LogitsProcessorList(),
    )
    want = processors(torch.tensor([context]), logits.clone()).softmax(-1)[0]
    draws = 4000
    threads: Any = [_Thread(seed, context) for seed in range(draws)]
    ids, logprobs = Sampler(config).pick(logits.expand(draws, -1), threads)
    got = torch.bincount(torch.tensor(ids), minlength=vocab) / draws
    assert (got[want == 0] == 0).all()
    assert (got - want).abs().max() < 5 * (0.25 / draws) ** 0.5
    torch.testing.assert_close(torch.tensor(logprobs), want.log()[torch.tensor(ids)])
    # A thread's draw does not depend on who is drawn beside it.
    alone = Sampler(config).pick(logits, [_Thread(17, context)])  # type: ignore[list-item]
    assert alone[0][0] == ids[17]


def test_stop_strings_end_a_thread() -> None:
    tokenizer = make_tokenizer("multiverse")
    model = make_model(tokenizer)
    forced = Forced({(): tokenizer.encode("abc. END more")})
    hf.attach(model, num_pages=64, page_size=4)
    from fork_attn.reason.job import Job

    config = GenerationConfig(stop_strings=["END"])
    job = Job(model, tokenizer, PROMPT, "multiverse", None, config, None, 0)
    job.samplers = [forced]  # type: ignore[list-item]
    (done,) = [e.trace for e in job.events(tokens=False) if isinstance(e, Finished)]
    assert done.text == "abc. END" and done.finish == "done"


# --- limits and full pools


def test_new_tokens_are_limited() -> None:
    model, tokenizer, cache = attached()
    trace = generate(
        model,
        tokenizer,
        PROMPT,
        protocol=BestOfN(n=3),
        sampling=SAMPLED,
        limits=Limits(max_new_tokens=20),
    )
    assert 20 <= trace.total_tokens <= 22 and trace.finish == "limit"
    assert [e.note for e in trace.events_of("limit")] == ["max_new_tokens"]
    assert all(t.status == "limit" for t in trace.threads)
    check_trace(trace)
    assert_free(cache)


def test_time_is_limited() -> None:
    model, tokenizer, cache = attached()
    traces = generate(
        model,
        tokenizer,
        [PROMPT, PROMPT],
        protocol="best_of_n",
        sampling=SAMPLED,
        limits=Limits(max_seconds=1e-9),
    )
    assert [t.finish for t in traces] == ["limit", "limit"]
    assert_free(cache)


def test_positions_of_the_model_end_a_thread() -> None:
    model, tokenizer, cache = attached("multiverse", max_position_embeddings=32)
    trace = generate(model, tokenizer, PROMPT, protocol="multiverse", sampling=SAMPLED)
    assert len(trace.token_ids) <= 32 - len(trace.prompt_ids) + 1
    assert "positions: the model has 32" in [e.note for e in trace.events_of("limit")]
    assert_free(cache)


def test_a_full_pool_ends_the_youngest_thread_of_a_lone_prompt() -> None:
    model, tokenizer, cache = attached(num_pages=10)
    trace = generate(model, tokenizer, PROMPT, protocol=BestOfN(n=4), sampling=SAMPLED)
    assert trace.events_of("limit") and "pool" in trace.events_of("limit")[0].note
    check_trace(trace)
    assert_free(cache)


def test_prompts_that_do_not_fit_together_run_one_after_another() -> None:
    """A full pool changes when prompts run, never what they say."""
    options = {"protocol": BestOfN(n=2), "sampling": SAMPLED, "seed": 3}
    prompts = [PROMPT * k for k in (1, 2, 1, 3)]
    model, tokenizer, cache = attached(num_pages=400)
    want = generate(model, tokenizer, prompts, **options)
    model, tokenizer, cache = attached(num_pages=34)
    got = generate(model, tokenizer, prompts, **options)
    assert [tokens_of(t) for t in got] == [tokens_of(t) for t in want]
    assert not any(t.events_of("limit") and t.finish == "done" for t in got)
    for trace in got:
        check_trace(trace)
    assert_free(cache)


def test_branches_of_others_are_left_alone() -> None:
    model, tokenizer, cache = attached()
    mine = cache.new_branch()
    hf.forward(model, {mine: [5, 6, 7]})
    generate(model, tokenizer, PROMPT, protocol="best_of_n", sampling=SAMPLED)
    assert cache.branches == (mine,) and mine.length == 3


# --- streams and transformers' generate


def test_a_stream_tells_what_the_trace_holds() -> None:
    model, tokenizer, cache = attached()
    events = list(stream(model, tokenizer, [PROMPT, "Hm"], protocol="best_of_n", sampling=SAMPLED))
    traces = {e.prompt: e.trace for e in events if isinstance(e, Finished)}
    assert len(traces) == 2
    for prompt, trace in traces.items():
        tokens: dict[int, list[TokenEvent]] = {}
        for event in events:
            if isinstance(event, TokenEvent) and event.prompt == prompt:
                tokens.setdefault(event.thread, []).append(event)
        for thread in trace.threads[1:]:
            mine = tokens[thread.id]
            assert tuple(event.token_id for event in mine) == thread.token_ids
            assert "".join(event.text for event in mine) == thread.text
            assert thread.text == tokenizer.decode(thread.token_ids)
        kinds = [e.event.kind for e in events if isinstance(e, ThreadEvent) and e.prompt == prompt]
        assert kinds == [event.kind for event in trace.events] == ["fork"]
    assert_free(cache)


def test_custom_generate() -> None:
    model, tokenizer, cache = attached()
    tokenizer.pad_token = EOS
    tokenizer.padding_side = "left"
    batch = tokenizer([PROMPT, "Hm"], return_tensors="pt", padding=True)
    loop = CustomGenerate(tokenizer, BestOfN(n=2))
    got = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        custom_generate=loop,
        max_new_tokens=12,
        do_sample=True,
        top_k=20,
    )
    assert [t.prompt for t in loop.traces] == [PROMPT, "Hm"]
    for row, trace in zip(got, loop.traces, strict=True):
        ids = [*trace.prompt_ids, *trace.token_ids]
        assert row[: len(ids)].tolist() == ids
        assert all(thread.num_sampled <= 12 for thread in trace.threads)
    assert_free(cache)


def test_every_protocol_ends_on_a_random_model() -> None:
    """Whatever a model writes, a generation ends, within its limits, and gives all pages back."""
    names = list(protocols())
    tokenizer = make_tokenizer(*names)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    model = make_model(tokenizer)
    cache = hf.attach(model, num_pages=512, page_size=4)
    limits = Limits(max_new_tokens=150)
    for name in names:
        trace = generate(model, tokenizer, PROMPT, protocol=name, sampling=SAMPLED, limits=limits)
        assert trace.total_tokens <= 150 + 16, name
        check_trace(trace)
        assert_free(cache)
