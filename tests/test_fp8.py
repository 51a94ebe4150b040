"""e4m3 caches: attention over what they hold, scales, copies, joins, drafts, Hugging Face."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hf_models import build
from plan_cases import DTYPES, RandomPlan, make_case, random_shape
from test_streams import FakeStream
from torch import Tensor

import fork_attn as fa
from fork_attn import hf
from fork_attn.ops_cache import gather_kv
from fork_attn.plan_buffers import PlanBuffers
from fork_attn.quantise import scale_for
from fork_attn.reference import attention
from fork_attn.rope import turn_of, turned
from fork_attn.testing.tolerance import assert_close_to_oracle

FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, DIM, DIM_V = 6, 2, 16, 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(20))
def test_cpu_kernel_on_random_plans(seed: int, dtype: torch.dtype) -> None:
    """Against float64 over the dequantised values; hidden slots hold NaN."""
    rng = random.Random(seed)
    shape = random_shape(rng, dtype)
    num_tokens = rng.choice([1, 5, 70])
    plan = RandomPlan(rng, shape, num_tokens=num_tokens, max_slots=rng.choice([3, 90])).build()
    case = make_case(shape, plan, heads_inside=rng.random() < 0.5)
    case.softcap = rng.choice([None, 2.0])
    case.sinks = torch.randn(shape.num_kv_heads * shape.group) if seed % 3 == 0 else None
    case.k_scale = torch.rand(shape.num_kv_heads) + 0.01
    case.v_scale = None if seed % 4 == 0 else torch.rand(shape.num_kv_heads) * 9
    case.k, case.v = (x.float().to(FP8) for x in (case.k, case.v))
    assert case.k.float().isnan().any()
    case.check()


class Threads:
    """An e4m3 cache of one layer, and for each branch the rows that it should see, in fp32."""

    def __init__(self, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"num_pages": 40, "page_size": 4, "dtype": FP8}
        self.cache = fa.ForkedKVCache(
            num_layers=1,
            num_q_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            head_dim_v=DIM_V,
            **(settings | kwargs),
        )
        self.seen: dict[fa.Branch, list[tuple[Tensor, Tensor]]] = {}

    def feed(self, counts: dict[fa.Branch, int], dtype: torch.dtype = torch.float32) -> None:
        total = sum(counts.values())
        q = torch.randn(total, HEADS, DIM).to(dtype)
        k, v = (torch.randn(total, KV_HEADS, dim).to(dtype) for dim in (DIM, DIM_V))
        with self.cache.step(counts) as step:
            out = self.cache.attend(0, q, k, v, step)
        first = 0
        for branch, count in counts.items():
            rows = self.seen.setdefault(branch, [])
            past = len(rows)
            rows += [(k[i], v[i]) for i in range(first, first + count)]
            mask = torch.ones(count, past + count, dtype=torch.bool).tril(past)
            self.check(out[first : first + count], q[first : first + count], rows, mask)
            first += count

    def check(
        self, out: Tensor, q: Tensor, rows: list[tuple[Tensor, Tensor]], mask: Tensor
    ) -> None:
        scales = self.cache.scales(0)
        assert scales is not None
        k, v = (
            (torch.stack(x).float() * (1 / s)[:, None]).clamp(-448, 448).to(FP8).double()
            * s.double()[:, None]
            for x, s in zip(zip(*rows, strict=True), scales, strict=True)
        )
        oracle, _ = attention(q, k, v, mask)
        reference, _ = attention(q, k, v, mask, dtype=torch.float32)
        assert_close_to_oracle(out, oracle, reference.to(q.dtype))


@pytest.mark.parametrize("tail", ["seal", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fork_join_and_copy_on_write(dtype: torch.dtype, tail: Any) -> None:
    threads = Threads(tail=tail)
    root = threads.cache.new_branch()
    threads.feed({root: 10}, dtype)
    left, right = root.fork(2)
    for child in (left, right):
        threads.seen[child] = list(threads.seen[root])
    for _ in range(3):
        threads.feed({left: 1, root: 2, right: 2}, dtype)
    new = threads.seen[left][10:] + threads.seen[right][10:]
    threads.seen[root] += new
    root.join([left, right])
    threads.feed({root: 3}, dtype)
    threads.cache.check()


def test_an_accepted_draft_is_moved_as_it_is() -> None:
    threads = Threads()
    cache, root = threads.cache, threads.cache.new_branch()
    threads.feed({root: 6})
    q, k, v = (torch.randn(5, h, d) for h, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    with cache.step({root: fa.Draft([-1, 0, 0, 2, 3])}) as step:
        cache.attend(0, q, k, v, step)
        step.accept([0, 2, 3])
    threads.seen[root] += [(k[i], v[i]) for i in (0, 2, 3)]
    threads.feed({root: 2})


def test_a_join_turns_the_stored_keys() -> None:
    """`rebase="copy"` turns e4m3 values as they are and rounds them again; scales stay."""
    rope = fa.Rope.from_base(DIM, 100.0)
    threads = Threads(rope=rope)
    root = threads.cache.new_branch()
    threads.feed({root: 7})
    left, right = root.fork(2)
    for child in (left, right):
        threads.seen[child] = list(threads.seen[root])
    threads.feed({left: 3, right: 2})
    scales = threads.cache.scales(0)
    assert scales is not None
    k = torch.stack([k for k, _ in threads.seen[right][7:]])
    raw = (k * (1 / scales[0])[:, None]).to(FP8).float()
    moved = turned(raw, rope, turn_of(rope, torch.tensor([3, 3]))).to(FP8).float()
    moved *= scales[0][:, None]
    threads.seen[root] += threads.seen[left][7:]
    threads.seen[root] += [(moved[i], v) for i, (_, v) in enumerate(threads.seen[right][7:])]
    root.join([left, right], rebase="copy")
    threads.feed({root: 2})


def test_the_first_write_calibrates_each_head() -> None:
    threads = Threads()
    root = threads.cache.new_branch()
    assert threads.cache.scales(0) is None
    k, v = torch.randn(8, KV_HEADS, DIM), torch.randn(8, KV_HEADS, DIM_V)
    k[3, 0, 5], v[:, 1] = -70.0, 0.0
    with threads.cache.step({root: 8}) as step:
        threads.cache.attend(0, torch.randn(8, HEADS, DIM), k, v, step)
    scales = threads.cache.scales(0)
    assert scales is not None
    torch.testing.assert_close(scales[0], k.abs().amax((0, 2)) / 224)
    torch.testing.assert_close(scales[1], torch.tensor([float(v.abs().max()) / 224, 1.0]))
    k_cache, v_cache = threads.cache.layer(0)
    stored, _ = gather_kv(
        *(k_cache, v_cache, step.slot_mapping),
        k_scale=scales[0],
        v_scale=scales[1],
        dtype=torch.float32,
    )
    error = (stored - k).abs()
    assert (error <= k.abs() / 16 + scales[0][:, None] * 2**-10).all()


def test_values_beyond_the_headroom_saturate() -> None:
    threads = Threads()
    cache, root = threads.cache, threads.cache.new_branch()
    cache.set_scales(0, torch.ones(KV_HEADS), torch.ones(KV_HEADS))
    with cache.step({root: 1}) as step:
        k, v = torch.full((1, KV_HEADS, DIM), 1e6), torch.full((1, KV_HEADS, DIM_V), -torch.inf)
        out = cache.attend(0, torch.randn(1, HEADS, DIM), k, v, step)
    assert out.eq(-448).all()


def test_bad_scales_change_nothing() -> None:
    threads = Threads()
    cache, root = threads.cache, threads.cache.new_branch()
    good = torch.ones(KV_HEADS)
    bad: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(3), ValueError, r"v_scale: expected shape \(2\)"),
        (good.double(), TypeError, "v_scale: expected dtype"),
        (good * 0, ValueError, "v_scale: expected positive"),
        (good * torch.nan, ValueError, "v_scale: expected positive"),
        (good * -1, ValueError, "v_scale: expected positive"),
        (1.0, TypeError, "v_scale: expected a Tensor"),
    ]
    for scale, error, message in bad:
        with pytest.raises(error, match=message):
            cache.set_scales(0, good, scale)
    with pytest.raises(ValueError, match="layer_idx"):
        cache.set_scales(1, good, good)
    assert cache.scales(0) is None
    threads.feed({root: 4})
    before = cache.scales(0)
    with pytest.raises(ValueError, match="stored with other scales"):
        cache.set_scales(0, good, good)
    after = cache.scales(0)
    assert before is not None and after is not None
    assert all(x is y for x, y in zip(before, after, strict=True))
    stream = FakeStream()
    cache._streams.add(stream)
    root.free()
    with pytest.raises(ValueError, match="let other streams finish"):  # it still reads them
        cache.set_scales(0, good, good)
    stream.finish()
    cache.set_scales(0, good, good)
    with pytest.raises(ValueError, match="expected a cache of"):
        Threads(dtype=torch.bfloat16).cache.set_scales(0, good, good)


def test_new_scales_take_the_place_of_the_old_ones() -> None:
    """A captured graph reads them where they were."""
    threads = Threads()
    cache, root = threads.cache, threads.cache.new_branch()
    threads.feed({root: 4})
    before = cache.scales(0)
    root.free()
    k_scale, v_scale = torch.tensor([0.25, 0.5]), torch.tensor([1.5, 0.125])
    cache.set_scales(0, k_scale, v_scale)
    after = cache.scales(0)
    assert before is not None and after is not None
    assert [x.data_ptr() for x in before] == [x.data_ptr() for x in after]
    assert torch.equal(after[0], k_scale) and torch.equal(after[1], v_scale)
    threads.feed({cache.new_branch(): 5})


@pytest.mark.parametrize("padding", [1e4, torch.nan])
def test_padding_sets_no_scales(padding: float) -> None:
    threads = Threads()
    cache, root = threads.cache, threads.cache.new_branch()
    buffers = PlanBuffers(cache, max_tokens=6)
    q, k, v = (torch.randn(6, h, d) for h, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    k[4:], v[4:] = padding, padding
    with pytest.raises(ValueError, match="k: expected rows"):
        buffers.attend(0, q, k, v)  # before there is a step
    with cache.step({root: 4}) as step:
        buffers.update(step)
        buffers.attend(0, q, k, v)
    scales = cache.scales(0)
    assert scales is not None
    for scale, rows in zip(scales, (k, v), strict=True):
        torch.testing.assert_close(scale, rows[:4].abs().amax((0, 2)) / 224)


def test_values_that_are_not_finite_show_in_the_scales_of_a_gpu() -> None:
    """Where nothing is read back to refuse them."""
    scales = scale_for(torch.tensor([0.0, 224.0, torch.inf, torch.nan]))
    assert scales[:2].tolist() == [1.0, 1.0] and not scales[2:].isfinite().any()


def test_values_that_are_not_finite_set_no_scales() -> None:
    threads = Threads()
    cache, root = threads.cache, threads.cache.new_branch()
    q, k, v = (torch.randn(2, h, d) for h, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    v[1, 0, 0] = torch.inf
    with cache.step({root: 2}) as step:
        with pytest.raises(ValueError, match="v: expected finite values"):
            cache.attend(0, q, k, v, step)
        assert cache.scales(0) is None
        v[1, 0, 0] = 1.0
        cache.attend(0, q, k, v, step)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_of_one_dtype(name: str) -> None:
    threads = Threads()
    root = threads.cache.new_branch()
    rows = dict(
        zip(
            ("q", "k", "v"),
            (torch.randn(1, h, d) for h, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V))),
            strict=True,
        )
    )
    rows[name] = rows[name].to(FP8 if name == "q" else torch.bfloat16)
    with threads.cache.step({root: 1}) as step:
        with pytest.raises(
            TypeError, match="q: expected dtype" if name == "q" else f"{name}: expected"
        ):
            threads.cache.attend(0, **rows, step=step)
        step.rollback()


def test_an_e4m3_cache_is_half_a_bf16_one() -> None:
    sizes = {}
    for dtype in (FP8, torch.bfloat16):
        threads = Threads(dtype=dtype)
        root = threads.cache.new_branch()
        step = threads.cache.step({root: 9})
        sizes[dtype] = (threads.cache.stats().kv_bytes, step.plan.unique_kv_bytes)
        step.rollback()
    assert sizes[torch.bfloat16] == tuple(2 * size for size in sizes[FP8])


def test_scales_of_tree_attention_are_checked() -> None:
    threads = Threads(dtype=torch.float32)
    root = threads.cache.new_branch()
    with threads.cache.step({root: 2}) as step:
        q = torch.randn(2, HEADS, DIM)
        k_cache, v_cache = (torch.randn_like(cache) for cache in threads.cache.layer(0))
        good = torch.ones(KV_HEADS)
        with pytest.raises(ValueError, match="k_scale: expected None"):
            fa.tree_attention(q, k_cache, v_cache, step.plan, k_scale=good)
        quantised = (k_cache.to(FP8), v_cache.to(FP8), step.plan)
        for bad, error in ((torch.ones(3), ValueError), (good.double(), TypeError)):
            with pytest.raises(error, match="v_scale: expected"):
                fa.tree_attention(q, *quantised, k_scale=good, v_scale=bad)
        with pytest.raises(TypeError, match="v_cache: expected dtype"):
            fa.tree_attention(q, quantised[0], v_cache, step.plan)
        results = [
            fa.tree_attention(q, *quantised, k_scale=good * 0.1, v_scale=good * 3, backend=backend)
            for backend in ("cpu", "reference")
        ]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        step.rollback()


def _logits(model: Any) -> Tensor:
    """A prompt, two threads of different lengths, their join, and one token behind it."""
    cache = model.fork_cache
    root = cache.new_branch()
    steps = [hf.forward(model, {root: list(range(5, 18))})]
    left, right = root.fork(2)
    steps.append(hf.forward(model, {left: [8, 9], right: [10]}))
    hf.join(root, [left, right], pending={left: 4, right: 7})
    steps.append(hf.forward(model, {root: [3]}))
    return torch.cat(steps).float()


def test_hf_model_on_an_e4m3_cache(one_thread: None) -> None:
    """The logits of the model over an fp32 cache whose K and V were rounded to e4m3 by torch."""
    model, plain = build("llama"), build("llama")
    quantised = model.fork_cache = hf.attach(model, num_pages=64, page_size=4, dtype=FP8)
    rounded = plain.fork_cache = hf.attach(plain, num_pages=64, page_size=4)
    exact = _logits(plain)
    got = _logits(model)
    attend = rounded.attend

    def attend_rounded(i: int, q: Tensor, k: Tensor, v: Tensor, step: fa.Step, **kw: Any) -> Tensor:
        scales = quantised.scales(i)
        assert scales is not None
        k, v = (
            (x * (1 / s)[:, None]).clamp(-448, 448).to(FP8).float() * s[:, None]
            for x, s in zip((k, v), scales, strict=True)
        )
        return attend(i, q, k, v, step, **kw)

    rounded.attend = attend_rounded  # type: ignore[method-assign]
    torch.testing.assert_close(got, _logits(plain), rtol=0, atol=1e-4)
    assert (got - exact).abs().max() > 1e-2  # rounding shows, or this test could not fail
    ratio = rounded._storage.page_bytes / quantised._storage.page_bytes
    assert ratio == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hf_models_of_16_bits_attend_in_their_own_dtype(
    dtype: torch.dtype, one_thread: None
) -> None:
    model = build("llama").to(dtype)
    cache = hf.attach(model, num_pages=64, page_size=4, dtype=FP8)
    assert hf.forward(model, {cache.new_branch(): [5, 6, 7]}).dtype == dtype
    assert cache.layer(0)[0].dtype == FP8


def test_hf_generate_on_an_e4m3_cache(one_thread: None) -> None:
    """Beams reorder and copy pages; two runs over the same prompt agree."""
    model = build("llama")
    cache = hf.attach(model, num_pages=64, page_size=4, dtype=FP8, tail="copy")
    prompt = torch.arange(5, 18)[None]
    runs = []
    for _ in range(2):
        rows = hf.ForkCache(cache)
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
        runs.append(model.generate(prompt, past_key_values=rows, **options))
        rows.free()
    assert torch.equal(*runs) and runs[0].shape == (1, 19)
