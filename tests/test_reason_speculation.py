"""Speculative decoding inside threads says what plain decoding says, in fewer steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_reason_systems as systems
import test_reason_tags as tags
import torch
from draft_pair import (
    LIMITS,
    TAGS,
    TAGS_OFF,
    assert_free,
    assert_same,
    drafters,
    few_tokens,
    plain_and_drafted,
)
from reason_pair import check_trace, make_model, make_tokenizer
from transformers import GenerationConfig

from fork_attn import hf
from fork_attn.reason import (
    DraftModel,
    Limits,
    Protocol,
    Trace,
    generate,
)
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
