"""Speculative decoding inside threads says what plain decoding says, in fewer steps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import test_reason_systems as systems
import test_reason_tags as tags
import torch
from draft_pair import Peek, assert_same, plain_and_drafted
from reason_pair import EOS, Forced, check_trace, make_model, make_tokenizer, run_forced
from transformers import GenerationConfig

from fork_attn import ForkedKVCache, Unsupported, hf
from fork_attn.reason import (
    CustomGenerate,
    DraftModel,
    Finished,
    Limits,
    PromptLookup,
    Protocol,
    Span,
    Speculation,
    Thread,
    TokenEvent,
    Trace,
    generate,
    stream,
    together,
    trace_show,
)
from fork_attn.reason.drafts import DraftTree
from fork_attn.reason.records import Log
from fork_attn.reason.run import Run
from fork_attn.reason.systems import BestOfN, TagProtocol
from fork_attn.reason.verify import Verification

pytestmark = pytest.mark.usefixtures("one_thread")

# Every exactness test of the protocols whose threads do not watch each other: there each step's
# logits are held against a dense pass with the system's own mask and positions.
EXACT: dict[str, Callable[[], None]] = {
    "multiverse": lambda: tags.test_union_joins_are_exact("multiverse", "llama"),
    "multiverse-qwen3": lambda: tags.test_union_joins_are_exact("multiverse", "qwen3"),
    "npr": lambda: tags.test_union_joins_are_exact("npr", "llama"),
    "threadweaver": lambda: tags.test_text_joins_are_exact("threadweaver"),
    "parallel_r1": lambda: tags.test_text_joins_are_exact("parallel_r1"),
    "parallel_r1_unseen": tags.test_parallel_r1_unseen_is_exact,
    "nested": tags.test_nested_forks_and_a_second_block_are_exact,
    "numbers": tags.test_entries_without_or_with_equal_numbers,
    "unclosed": tags.test_a_path_without_end_is_closed,
    "eos-in-a-thread": tags.test_a_thread_that_ends_the_text_ends_threadweaver,
    "depth": tags.test_depth_is_limited,
    "best_of_n": lambda: systems.test_samples_of_one_prompt_are_exact("best_of_n"),
    "self_consistency": lambda: systems.test_samples_of_one_prompt_are_exact("self_consistency"),
    "first_finish": lambda: systems.test_samples_of_one_prompt_are_exact("first_finish"),
    "parathinker": lambda: systems.test_parathinker_is_exact(True, False),
    "parathinker-first": lambda: systems.test_parathinker_is_exact(True, True),
    "aspd": systems.test_aspd_is_exact,
    "pasta": systems.test_pasta_is_exact,
    "apar": systems.test_apar_is_exact,
    "apr": systems.test_apr_is_exact,
    "leap": systems.test_leap_is_exact,
    "skeleton_of_thought": systems.test_skeleton_of_thought_is_exact,
    "tree_of_thoughts": systems.test_tree_of_thoughts_is_exact,
    "dpts": systems.test_best_first_search_is_exact,
    "threadweaver_rebase": systems.test_threadweaver_by_rebase,
}


@pytest.mark.parametrize("name", EXACT)
def test_every_protocol_is_exact_with_drafts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Trace] = []

    def run(*args: Any, **options: Any) -> list[Trace]:
        got = plain_and_drafted(*args, **options)
        traces.extend(got)
        return got

    monkeypatch.setattr(systems, "run_forced", run)
    monkeypatch.setattr(tags, "run_forced", run)
    EXACT[name]()
    assert sum(trace.accepted_tokens for trace in traces) > 0
    assert all(trace.drafted_tokens >= trace.accepted_tokens for trace in traces)
    for trace in traces:
        check_trace(trace)


# --- drafters that tests do not help, on a model that is not scripted

# Characters as tags, so that a random model forks, nests and errs all the time.
TAGS = TagProtocol(
    name="drafted tags", fork_at="c", child_ends="d", fanout=2, header="x", closing="d", after="y",
)  # fmt: skip
LIMITS = Limits(max_thread_tokens=10, max_depth=2)


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


@pytest.fixture
def misses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each token that a thread went on with and its draft did not hold."""
    found: list[int] = []
    follow = Verification.follow

    def counted(self: Verification, writers: Any, over: Any) -> Any:
        for thread in writers:
            tree, path = self._trees.get(thread), self.paths.get(thread)
            if tree is not None and thread.goal == "write" and thread.run not in over:
                node = path[-1] if path else -1
                if node in tree.parents and tree.child(node, thread.queue[0]) is None:
                    found.append(thread.queue[0])
        return follow(self, writers, over)

    monkeypatch.setattr(Verification, "follow", counted)
    return found


def assert_free(*models: Any) -> None:
    for model in models:
        cache: ForkedKVCache = hf._link.link_of(model).cache
        assert cache.stats().pages_live == 0 and cache.branches == ()
        cache.check()


@pytest.mark.parametrize(
    "protocol",
    [TAGS, replace(TAGS, join="text"), replace(TAGS, join="rebase"), replace(TAGS, position="sum")],
    ids=["union", "text", "rebase", "sum"],
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "repetition_penalty": 1.2}])
def test_drafts_change_nothing_in_sampled_trees(
    protocol: Protocol, options: dict[str, Any], misses: list[int]
) -> None:
    """Forks, joins, malformed tags and limits, drawn at random; the same seeds draw the same."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight *= 0.5  # texts of some length: no end token that is almost certain
    speculations = drafters(model)
    hf.attach(model, num_pages=512, page_size=4)
    sampling = few_tokens(model, **options)
    prompts = ["go on", "hm"]
    call = {"protocol": protocol, "sampling": sampling, "limits": LIMITS}
    seen: set[str] = set()
    accepted = dict.fromkeys(speculations, 0)
    for seed in range(4):
        plain = generate(model, tokenizer, prompts, seed=10 * seed, **call)
        for name, speculation in speculations.items():
            drafted = generate(
                model, tokenizer, prompts, seed=10 * seed, speculation=speculation, **call
            )
            if name != "lookup":  # the branches of the same model see what the threads see
                assert bool(misses) == (name == "other model")
            misses.clear()
            for want, got in zip(plain, drafted, strict=True):
                assert_same(want, got)
                check_trace(got)
                seen |= {event.kind for event in got.events} | {t.status for t in got.threads}
                accepted[name] += got.accepted_tokens
    assert accepted["same model"] > accepted["other model"] > 0
    assert seen >= {"fork", "join", "malformed", "limit"}
    assert_free(model, *(s.model for s in speculations.values() if isinstance(s, DraftModel)))


NAMED = ("best_of_n", "first_finish", "leap", "tree_of_thoughts", "dpts", "skeleton_of_thought")


@pytest.mark.parametrize("name", NAMED)
def test_drafts_change_nothing_under_greedy(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    model = make_model(tokenizer)
    speculations = drafters(model)
    hf.attach(model, num_pages=512, page_size=4)
    call = {"protocol": name, "limits": Limits(max_thread_tokens=40)}
    sampling = GenerationConfig(do_sample=False)
    if name in ("best_of_n", "tree_of_thoughts", "dpts"):
        # Equal texts would be ranked by rounding alone.
        sampling = GenerationConfig(do_sample=True, top_k=4, temperature=0.5)
    saved: list[int] = []
    want = generate(model, tokenizer, "Is 91 prime?", sampling=sampling, **call)
    for speculation in speculations.values():
        got = generate(
            model, tokenizer, "Is 91 prime?", sampling=sampling, speculation=speculation, **call
        )
        assert_same(want, got)
        assert got.steps_saved == len(want.steps) - len(got.steps)
        saved.append(got.steps_saved)
    assert saved[0] > 0 and saved[1] == 29  # 40 tokens in drafts of 3: the same model never errs
    assert_free(model)


# --- sampling


def test_drafts_keep_the_distribution() -> None:
    """All outcomes of three tokens over three, with a penalty that depends on the tokens before,
    against their exact probabilities under the stock model and transformers' processors."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    draft = make_model(tokenizer, num_hidden_layers=1)
    with torch.no_grad():  # none of the three is certain, and none of them unlikely
        for one in (model, draft):
            one.lm_head.weight *= 0.4
    stock = copy.deepcopy(model)
    config = few_tokens(model, repetition_penalty=1.5, temperature=0.8)
    config.suppress_tokens = [0, *range(4, model.config.vocab_size)]
    prompt = "go"
    want = {
        (a, b, c): _probability(stock, config, tokenizer.encode(prompt), (a, b, c))
        for a in range(1, 4) for b in range(1, 4) for c in range(1, 4)
    }  # fmt: skip
    assert sum(want.values()) == pytest.approx(1.0)
    hf.attach(model, num_pages=8192, page_size=4)
    hf.attach(draft, num_pages=8192, page_size=4)
    n = 1500
    traces = generate(
        model, tokenizer, [prompt] * n, protocol=TAGS_OFF, sampling=config,
        limits=Limits(max_new_tokens=3), speculation=DraftModel(draft, num_tokens=2, candidates=2),
    )  # fmt: skip
    accepted = sum(trace.accepted_tokens for trace in traces)
    drafted = sum(trace.drafted_tokens for trace in traces)
    assert 0.2 < accepted / drafted < 0.8
    counts = dict.fromkeys(want, 0)
    for trace in traces:
        counts[trace.token_ids] += 1  # type: ignore[index]
    chi2 = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in want.items())
    assert chi2 < 54.0  # 26 degrees of freedom: one in a thousand is above


TAGS_OFF = replace(TAGS, name="no tags", fork_at="z", child_ends="z")


def _probability(
    model: Any, config: GenerationConfig, ids: list[int], said: tuple[int, ...]
) -> float:
    import transformers

    result, line = 1.0, list(ids)
    for token in said:
        seen = torch.tensor([line])
        processors = model._get_logits_processor(
            config, len(line), seen, device="cpu", model_kwargs={},
            logits_processor=transformers.LogitsProcessorList(),
        )  # fmt: skip
        with torch.no_grad():
            logits = model(seen).logits[:, -1].double()
        result *= processors(seen, logits).softmax(-1)[0, token].item()
        line.append(token)
    return result


# --- limits


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
