"""`model.generate` over a ForkCache gives the same tokens as stock transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from hf_models import VOCAB, build, random_tokens, stock_copy

from fork_attn import ForkedKVCache, OutOfPages, hf

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "deepseek_v3"]
PROMPT = 11
NEW = 12


@dataclass
class Pair:
    """An attached model, its cache, and a stock model with the same weights."""

    model: transformers.PreTrainedModel
    stock: transformers.PreTrainedModel
    cache: ForkedKVCache


@pytest.fixture(scope="module", params=MODELS)
def shared_pair(request: pytest.FixtureRequest) -> Pair:
    model = build(request.param)
    stock = stock_copy(model, request.param)
    return Pair(model, stock, hf.attach(model, num_pages=256, page_size=4))


@pytest.fixture
def pair(shared_pair: Pair) -> Iterator[Pair]:
    yield shared_pair
    cache = shared_pair.cache
    cache.check()
    left = cache.branches
    cache.free(left)
    assert not left and cache.stats().pages_live == 0, "a test left branches or pages behind"


def prompts(rows: int) -> torch.Tensor:
    return torch.tensor([random_tokens(PROMPT, seed=i) for i in range(rows)])


def generate(
    model: transformers.PreTrainedModel, ids: torch.Tensor, **options: Any
) -> torch.Tensor:
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    return model.generate(ids, **options)


def assert_same_tokens(pair: Pair, ids: torch.Tensor, **options: Any) -> None:
    cache = hf.ForkCache(pair.cache)
    got = generate(pair.model, ids, past_key_values=cache, **options)
    expected = generate(pair.stock, ids, **options)
    assert got.shape[1] > ids.shape[1]
    assert got.tolist() == expected.tolist()
    cache.free()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 4},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill, beams": {"prefill_chunk_size": 3, "num_beams": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_stock(pair: Pair, mode: str) -> None:
    assert_same_tokens(pair, prompts(2), **MODES[mode])


@pytest.mark.parametrize(
    "mode", ["greedy", "sampling", "beams", "num_return_sequences", "chunked prefill"]
)
def test_left_padded_batch(pair: Pair, mode: str) -> None:
    ids = prompts(3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :2] = 0
    assert_same_tokens(pair, ids, attention_mask=mask, **MODES[mode])


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_lookup(pair: Pair, do_sample: bool) -> None:
    ids = prompts(1).repeat(1, 2)
    assert_same_tokens(pair, ids, prompt_lookup_num_tokens=3, do_sample=do_sample)


def test_assistant_model(pair: Pair) -> None:
    assert_same_tokens(pair, prompts(1), assistant_model=build("llama", seed=5))


def test_rows_that_end_early(pair: Pair) -> None:
    """A row that reached its end goes on with padding tokens, as in stock."""
    free = generate(pair.stock, prompts(2))
    stop = int(free[0, PROMPT + 3])
    assert_same_tokens(pair, prompts(2), eos_token_id=stop)


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked prefill"])
def test_attached_model_with_a_stock_cache(pair: Pair, mode: str) -> None:
    ids = prompts(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        got = generate(pair.model, ids, **MODES[mode], **options)
        expected = generate(pair.stock, ids, **MODES[mode], **options)
        assert got.tolist() == expected.tolist()


def test_stock_forward_of_an_attached_model_is_the_same(pair: Pair) -> None:
    ids = prompts(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}, {"use_cache": False}):
            got = pair.model(ids, **options).logits
            expected = pair.stock(ids, **options).logits
            keep = options.get("attention_mask", torch.ones_like(ids)) != 0
            torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=1e-5)


def test_prefill_once_then_fork_then_generate(pair: Pair) -> None:
    prefix, tails = prompts(1), torch.tensor([random_tokens(3, seed=30 + i) for i in range(3)])
    root = pair.cache.new_branch()
    hf.forward(pair.model, {root: prefix[0].tolist()})
    used = pair.cache.stats().pages_live
    cache = hf.ForkCache(pair.cache, root.fork(3))
    ids = torch.cat([prefix.expand(3, -1), tails], 1)
    got = generate(pair.model, ids, past_key_values=cache)
    assert got.tolist() == generate(pair.stock, ids).tolist()
    # 3 own tokens and all but the last new one: 14, in at most 5 pages of 4 a row.
    assert pair.cache.stats().pages_live <= used + 3 * 5
    assert root.length == PROMPT
    cache.free()
    root.free()


def test_going_on_with_the_same_cache(pair: Pair) -> None:
    ids = prompts(2)
    cache = hf.ForkCache(pair.cache)
    first = generate(pair.model, ids, past_key_values=cache)
    # The second turn: everything so far and a few tokens more.
    more = torch.cat([first, torch.tensor([[5, 6], [7, 8]])], 1)
    mask = torch.ones_like(more)  # else a row that ended early would have its padding hidden
    second = generate(pair.model, more, attention_mask=mask, past_key_values=cache)
    assert second.tolist() == generate(pair.stock, more, attention_mask=mask).tolist()
    cache.free()


def test_batch_repeat_interleave_and_select(pair: Pair) -> None:
    ids = prompts(2)
    cache = hf.ForkCache(pair.cache)
    with torch.no_grad():
        pair.model(ids, past_key_values=cache)
    used = pair.cache.stats().pages_live
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0, 0, 2]))
    assert cache.batch_size == 4
    assert pair.cache.stats().pages_live == used
    rows = ids[[1, 0, 0, 0]]
    ends = torch.cat([rows, torch.tensor([[9], [10], [11], [12]])], 1)
    got = generate(pair.model, ends, past_key_values=cache)
    assert got.tolist() == generate(pair.stock, ends).tolist()
    cache.free()


def test_branches_of_different_lengths_take_a_left_padded_batch(pair: Pair) -> None:
    short, long = random_tokens(4, seed=1), random_tokens(9, seed=2)
    branches = [pair.cache.new_branch() for _ in range(2)]
    hf.forward(pair.model, dict(zip(branches, (short, long), strict=True)))
    cache = hf.ForkCache(pair.cache, branches)
    assert cache.get_seq_length() == 9
    ids = torch.tensor([[0] * 5 + short + [7], [*long, 8]])
    mask = (torch.arange(10) >= torch.tensor([[5], [0]])).long()
    got = generate(pair.model, ids, attention_mask=mask, past_key_values=cache)
    assert got.tolist() == generate(pair.stock, ids, attention_mask=mask).tolist()
    cache.free()


def test_crop_across_padding(pair: Pair) -> None:
    ids = prompts(2)
    mask = torch.ones_like(ids)
    mask[0, 6:8] = 0  # a hole: neither stored nor counted
    cache = hf.ForkCache(pair.cache)
    with torch.no_grad():
        pair.model(ids, attention_mask=mask, past_key_values=cache)
        assert [b.length for b in cache.branches] == [9, 11]
        cache.crop(0)
        cache.crop(-4)
        assert [b.length for b in cache.branches] == [6, 7]
        assert cache.get_seq_length() == 7
        got = pair.model(ids[:, 7:8], past_key_values=cache).logits[:, -1]
        expected = [
            pair.stock(ids[:1, [0, 1, 2, 3, 4, 5, 7]]).logits[0, -1],
            pair.stock(ids[1:, :8]).logits[0, -1],
        ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-4)
    cache.free()


def test_same_prompts_are_stored_once() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=64, page_size=4)
    rows = hf.ForkCache(cache)
    generate(model, prompts(1), past_key_values=rows, num_return_sequences=4, do_sample=True)
    own = -(-(NEW - 1) // 4)  # pages of a row's own tokens, one fewer where it went on in the tail
    assert cache.stats().pages_live <= -(-PROMPT // 4) + 4 * own
    rows.free()


def test_padding_is_not_stored_and_gives_zeros() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=64, page_size=4)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :6] = 0
    rows = hf.ForkCache(cache)
    with torch.no_grad():
        logits = model(prompts(2), attention_mask=mask, past_key_values=rows).logits
    assert logits.isfinite().all()
    assert [b.length for b in rows.branches] == [PROMPT, PROMPT - 6]
    assert len(seen) == 2
    for out in seen:
        assert (out[1, :6] == 0).all()
        assert (out[mask != 0] != 0).any(-1).all()


def test_positions_after_a_join_are_the_branches_own() -> None:
    """`generate` counts tokens; the branch knows that its children wrote side by side."""
    model = build("llama")
    cache = hf.attach(model, num_pages=64, page_size=4)
    root = cache.new_branch()
    hf.forward(model, {root: random_tokens(6, seed=1)})
    children = root.fork(2)
    hf.forward(model, {c: random_tokens(4, seed=2 + i) for i, c in enumerate(children)})
    hf.join(root, children)
    assert (root.length, root.position) == (14, 10)
    by_hand = root.fork()[0]
    expected = random_tokens(2, seed=9)
    last = hf.forward(model, {by_hand: expected})
    for _ in range(5):
        expected = [*expected, int(last[0].argmax())]
        last = hf.forward(model, {by_hand: expected[-1:]})
    rows = hf.ForkCache(cache, [root])
    ids = torch.tensor([[3] * 14 + expected[:2]])
    got = generate(model, ids, past_key_values=rows, max_new_tokens=5)
    assert got[0, 14:].tolist() == expected
    assert root.position == by_hand.position - 1


def test_prompt_longer_than_the_pool_changes_nothing() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=4, page_size=4)
    rows = hf.ForkCache(cache)
    long = torch.tensor([random_tokens(17, seed=1)])
    with pytest.raises(OutOfPages) as error:
        generate(model, long, past_key_values=rows)
    assert error.value.needed > error.value.free
    assert cache.branches == () and rows.branches == () and rows.get_seq_length() == 0
    root = cache.new_branch()
    hf.forward(model, {root: random_tokens(9, seed=2)})
    before = (cache.stats(), root.length, root.position)
    with pytest.raises(OutOfPages):
        hf.forward(model, {root: random_tokens(8, seed=3)})
    with pytest.raises(OutOfPages), torch.no_grad():
        model(long, past_key_values=hf.ForkCache(cache, [root]))
    assert (cache.stats(), root.length, root.position) == before
    got = generate(model, long[:, :3], past_key_values=rows, max_new_tokens=2)
    assert got.shape == (1, 5) and int(got.max()) < VOCAB
