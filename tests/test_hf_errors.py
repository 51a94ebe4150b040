"""Wrong calls of an attached model and of its ForkCache: typed errors, and nothing changed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers
from hf_models import build, random_tokens, stock_copy

from fork_attn import (
    Branch,
    DuplicateBranch,
    ForeignBranch,
    ForkedKVCache,
    StaleBranch,
    StalePlan,
    StepOpen,
    Unsupported,
    hf,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama() -> tuple[transformers.PreTrainedModel, ForkedKVCache]:
    model = build("llama")
    return model, hf.attach(model, num_pages=32, page_size=4)


def _state(cache: ForkedKVCache) -> list[Any]:
    cache.check()
    return [cache.stats(), *((b.id, b.length, b.position) for b in cache.branches)]


def _call(model: Any, cache: hf.ForkCache, ids: list[list[int]], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids), past_key_values=cache, **options).logits


def test_fork_cache_on_a_model_that_is_not_attached(llama: Any) -> None:
    _, cache = llama
    branch = cache.new_branch()
    before = _state(cache)
    for other in (build("llama"), build("gpt2")):
        with pytest.raises(Unsupported, match="not attached"):
            _call(other, hf.ForkCache(cache, [branch]), [[3, 4]])
    with pytest.raises(Unsupported, match="not attached"):
        hf.forward(build("llama"), {branch: [3]})
    assert _state(cache) == before


def test_fork_cache_of_another_models_cache(llama: Any) -> None:
    model, cache = llama
    other = hf.attach(build("llama"), num_pages=8)
    with pytest.raises(ForeignBranch, match="another cache"):
        _call(model, hf.ForkCache(other), [[3, 4]])
    with pytest.raises(ForeignBranch):
        hf.forward(model, {other.new_branch(): [3]})
    assert cache.branches == ()


def test_fork_cache_arguments(llama: Any) -> None:
    _, cache = llama
    a, b, freed = (cache.new_branch() for _ in range(3))
    freed.free()
    foreign = ForkedKVCache(num_layers=1, num_pages=1, num_q_heads=1, num_kv_heads=1, head_dim=8)
    cases: list[tuple[Any, type[Exception], str]] = [
        ([a, b, a], DuplicateBranch, "given twice"),
        ([a, freed], StaleBranch, r"branches\[1\]"),
        ([foreign.new_branch()], ForeignBranch, r"branches\[0\]"),
        ([], ValueError, "at least one"),
        ([1], TypeError, "got int"),
    ]
    for branches, error, message in cases:
        with pytest.raises(error, match=message):
            hf.ForkCache(cache, branches)
    with pytest.raises(TypeError, match="expected a ForkedKVCache"):
        hf.ForkCache([a])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[3], [4]], {}, ValueError, "expected 1 rows, one a branch, got 2"),
        ([[3, 4]], {"attention_mask": torch.ones(1, 2)}, ValueError, r"expected shape \(1, 7\)"),
        ([[3]], {"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1]])}, ValueError, "shows 3"),
        ([[3]], {"attention_mask": torch.ones(1, 1, 1, 6)}, Unsupported, "2-D mask"),
        ([[3]], {"position_ids": torch.tensor([[9]])}, ValueError, r"got \[9\], expected .* \[5\]"),
        ([[3]], {"position_ids": torch.tensor([[[5]]] * 3)}, Unsupported, "position_ids"),
        ([[]], {}, ValueError, "at least one token"),
        ([[3]], {"output_attentions": True}, Unsupported, "output_attentions"),
        ([[3]], {"pixel_values": torch.zeros(1)}, Unsupported, "text only"),
        ([[97]], {}, IndexError, "out of range"),
    ],
)
def test_wrong_calls_change_nothing(
    llama: Any, ids: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, cache = llama
    branch = cache.new_branch()
    hf.forward(model, {branch: random_tokens(5, seed=1)})
    rows = hf.ForkCache(cache, [branch])
    before = _state(cache)
    with pytest.raises(error, match=message), torch.no_grad():
        model(torch.tensor(ids, dtype=torch.long), past_key_values=rows, **options)
    assert _state(cache) == before and rows.get_seq_length() == 5
    _call(model, rows, [[3]])
    assert branch.length == 6


def test_gradients_and_dropout_are_refused(llama: Any) -> None:
    model, cache = llama
    with pytest.raises(Unsupported, match="no_grad"):
        model(torch.tensor([[3, 4]]), past_key_values=hf.ForkCache(cache))
    trained = build("gpt2").train()
    with pytest.raises(Unsupported, match=r"model\.eval"):
        hf.forward(trained, {hf.attach(trained, num_pages=4).new_branch(): [3]})
    assert cache.branches == () and cache.stats().pages_live == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_forward_that_fails_half_way_is_rolled_back(llama: Any, error: type[BaseException]) -> None:
    model, cache = llama
    branch = cache.new_branch()
    hf.forward(model, {branch: [3, 4, 5]})
    before = _state(cache)

    def fail(*_: Any) -> None:
        raise error("on purpose")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    rows = hf.ForkCache(cache, [branch])
    for attempt in (
        lambda: _call(model, rows, [[6, 7]]),
        lambda: _call(model, hf.ForkCache(cache), [[6, 7], [6, 7]]),
        lambda: hf.forward(model, {branch: [6, 7]}),
    ):
        with pytest.raises(error, match="on purpose"):
            attempt()
        gc.collect()
        assert _state(cache) == before
    hook.remove()
    stock = stock_copy(build("llama"), "llama")
    expected = stock(torch.tensor([[3, 4, 5, 6, 7]])).logits[0, -1]
    torch.testing.assert_close(_call(model, rows, [[6, 7]])[0, -1], expected, rtol=0, atol=1e-4)


def test_interrupted_call_is_closed_by_the_next(llama: Any) -> None:
    """Also while a traceback still holds the interrupted frames."""
    model, cache = llama
    rows = hf.ForkCache(cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as held:
        _call(model, rows, [[6, 7]])
    hook.remove()
    _call(model, rows, [[6, 7, 8]])
    assert held.tb is not None and [b.length for b in rows.branches] == [3]
    assert cache.branches == rows.branches


def test_model_and_decoder_can_be_called_directly(llama: Any) -> None:
    """`model.forward` skips the model's hooks; the decoder's do the work."""
    model, cache = llama
    ids = [random_tokens(4, seed=1)]
    rows = [hf.ForkCache(cache) for _ in range(3)]
    with torch.no_grad():
        expected = model(torch.tensor(ids), past_key_values=rows[0]).logits
        direct = model.forward(torch.tensor(ids), past_key_values=rows[1]).logits
        hidden = model.model(torch.tensor(ids), None, None, rows[2]).last_hidden_state
    assert torch.equal(direct, expected)
    assert torch.equal(model.lm_head(hidden), expected)
    assert [r.branches[0].length for r in rows] == [4, 4, 4]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "got no tokens"), ([97], "token id 97"), ([3, -1], "token id -1")],
)
def test_forward_refuses_bad_tokens(llama: Any, tokens: list[int], message: str) -> None:
    model, cache = llama
    branch = cache.new_branch()
    with pytest.raises(ValueError, match=message):
        hf.forward(model, {branch: tokens})
    with pytest.raises(ValueError):
        hf.forward(model, {})
    with pytest.raises(TypeError):
        hf.forward(model, {branch: [1.5]})  # type: ignore[list-item]
    with pytest.raises(ValueError, match="logits"):
        hf.forward(model, {branch: [3]}, logits="first")  # type: ignore[arg-type]
    assert branch.length == 0 and cache.stats().pages_live == 0


def test_forward_checks_a_given_step(llama: Any) -> None:
    model, cache = llama
    a, b = cache.new_branch(), cache.new_branch()
    foreign = hf.attach(build("llama"), num_pages=8)
    with cache.step({a: 2, b: 1}) as step:
        wrong: list[dict[Branch, list[int]]] = [{b: [3], a: [3, 4]}, {a: [3, 4]}, {a: [3], b: [3]}]
        for tokens in wrong:
            with pytest.raises(ValueError, match="expected"):
                hf.forward(model, tokens, step=step)
        with pytest.raises(StepOpen):
            hf.forward(model, {a: [3]})
        hf.forward(model, {a: [3, 4], b: [5]}, step=step)
        assert step.state == "open"
    assert (a.length, b.length) == (2, 1)
    with pytest.raises(StalePlan, match="committed"):
        hf.forward(model, {a: [3, 4], b: [5]}, step=step)
    other = foreign.new_branch()
    with foreign.step({other: 1}) as step, pytest.raises(StalePlan, match="not a step of"):
        hf.forward(model, {other: [3]}, step=step)


def test_forward_needs_a_head() -> None:
    base = build("llama").model
    cache = hf.attach(base, num_pages=8)
    with pytest.raises(Unsupported, match="head"):
        hf.forward(base, {cache.new_branch(): [3]})
    with torch.no_grad():
        base(torch.tensor([[3, 4]]), past_key_values=hf.ForkCache(cache))


def test_fork_cache_after_free_and_reset(llama: Any) -> None:
    model, cache = llama
    rows = hf.ForkCache(cache)
    _call(model, rows, [[3, 4]])
    rows.reset()
    assert cache.branches == () and rows.get_seq_length() == 0
    _call(model, rows, [[3, 4], [5, 6]])
    rows.free()
    assert cache.branches == () and rows.branches == ()
    with pytest.raises(StaleBranch, match="was freed"):
        _call(model, rows, [[3]])


def test_row_that_was_freed_outside(llama: Any) -> None:
    model, cache = llama
    rows = hf.ForkCache(cache)
    _call(model, rows, [[3, 4], [5, 6]])
    keep, gone = rows.branches
    gone.free()
    before = _state(cache)
    for attempt in (
        lambda: _call(model, rows, [[3], [4]]),
        lambda: rows.crop(-1),
        lambda: rows.reorder_cache(torch.tensor([1, 0])),
        lambda: rows.batch_repeat_interleave(2),
    ):
        with pytest.raises(StaleBranch):
            attempt()
        assert _state(cache) == before and keep.length == 2


@pytest.mark.parametrize("count", [1, -3])
def test_crop_out_of_range(llama: Any, count: int) -> None:
    model, cache = llama
    rows = hf.ForkCache(cache)
    _call(model, rows, [[3, 4]])
    with pytest.raises(ValueError, match="tokens_to_remove"):
        rows.crop(count)
    with pytest.raises(ValueError, match="repeats"):
        rows.batch_repeat_interleave(0)
    assert rows.branches[0].length == 2
