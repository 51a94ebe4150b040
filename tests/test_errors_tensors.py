"""Bad tensors, layers, steps and options, what no cache can be made of, and two threads at once."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_pair import CachePair
from kv_table import Model

from fork_attn import (
    ConcurrentUse,
    Draft,
    ForkedKVCache,
    StalePlan,
    Step,
    Unsupported,
)

MODEL = Model(num_q_heads=4, num_kv_heads=2, head_dim=4, head_dim_v=6, windows=(None, 5))


class Scene:
    """A cache with a root of six tokens and a child, and a branch of another cache."""

    def __init__(self) -> None:
        self.pair = CachePair(MODEL)
        self.cache = self.pair.cache
        self.root = self.pair.new_branch()
        self.pair.step({self.root: 6})
        (self.a,) = self.pair.fork(self.root)
        self.other = CachePair(MODEL)
        self.foreign = self.other.new_branch()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def _tensors(tokens: int = 3) -> dict[str, torch.Tensor]:
    return {
        "q": torch.randn(tokens, 4, 4),
        "k": torch.randn(tokens, 2, 4),
        "v": torch.randn(tokens, 2, 6),
    }


TENSORS: list[tuple[str, type[Exception], Callable[[torch.Tensor], object], str]] = [
    ("rows", ValueError, lambda t: t[:2], "expected shape (3, "),
    ("more rows", ValueError, lambda t: torch.cat([t, t]), "expected shape (3, "),
    ("heads", ValueError, lambda t: t.repeat(1, 2, 1), "expected shape (3, "),
    ("dim", ValueError, lambda t: t[..., :3], "expected shape (3, "),
    ("batch", ValueError, lambda t: t[None], "expected shape (3, "),
    ("dtype", TypeError, lambda t: t.half(), "expected dtype torch.float32, got torch.float16"),
    ("float64", TypeError, lambda t: t.double(), "expected dtype torch.float32, got torch.float64"),
    ("device", ValueError, lambda t: t.to("meta"), "expected device cpu, got meta"),
    ("type", TypeError, lambda t: t.tolist(), "expected a Tensor, got list"),
    (
        "stride",
        ValueError,
        lambda t: torch.empty(*t.shape[:2], 2 * t.shape[2])[..., ::2],
        "expected a contiguous last dimension, got stride 2",
    ),
]


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("error", "spoil", "match"), [pytest.param(*c[1:], id=c[0]) for c in TENSORS]
)
def test_wrong_tensors(
    scene: Scene,
    name: str,
    error: type[Exception],
    spoil: Callable[[torch.Tensor], object],
    match: str,
) -> None:
    pair = scene.pair
    counts = {scene.a: 2, scene.root: 1}
    with scene.cache.step(counts) as step:
        tensors = _tensors()
        tensors[name] = spoil(tensors[name])  # type: ignore[assignment]
        stored = [t.clone() for layer in (0, 1) for t in scene.cache.layer(layer)]
        call = lambda: scene.cache.attend(0, **tensors, step=step)  # noqa: E731
        pair.raises(error, re.escape(f"{name}: {match}"), call)
        after = [t for layer in (0, 1) for t in scene.cache.layer(layer)]
        assert all(  # nothing was written, not even by the tensors that were right
            torch.equal(x.view(torch.int32), y.view(torch.int32))
            for x, y in zip(stored, after, strict=True)
        )
        rows = pair.rows(counts)
        pair.attend(rows, step)
    pair.oracle.step(rows)
    pair.check()


def test_rows_may_have_any_stride_but_the_last(scene: Scene) -> None:
    with scene.cache.step({scene.a: 3}) as step:
        tensors = _tensors()
        strided = {
            name: torch.cat([t, t + 9], dim=-1)[..., : t.shape[2]] for name, t in tensors.items()
        }
        assert not any(t.is_contiguous() for t in strided.values())
        expected = scene.cache.attend(0, **tensors, step=step)
        assert torch.equal(scene.cache.attend(0, **strided, step=step), expected)
        step.rollback()


def test_the_wrong_layer_or_step(scene: Scene) -> None:
    pair, cache, tensors = scene.pair, scene.cache, _tensors()
    foreign = scene.other.cache.step({scene.foreign: 3})
    step = cache.step({scene.a: 3})
    for layer in (2, -1, 10**20):
        pair.raises(
            ValueError,
            "layer_idx: expected 0 to 1",
            lambda i=layer: cache.attend(i, **tensors, step=step),
        )
    pair.raises(TypeError, "layer_idx", lambda: cache.attend(0.0, **tensors, step=step))
    pair.raises(
        ValueError,
        "step: expected one of this cache",
        lambda: cache.attend(0, **tensors, step=foreign),
    )
    pair.raises(TypeError, "step: expected a Step", lambda: cache.attend(0, **tensors, step=None))
    step.rollback()
    pair.raises(
        StalePlan, "step: expected an open step", lambda: cache.attend(0, **tensors, step=step)
    )
    pair.check()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive number"),
        ({"softcap": float("nan")}, ValueError, "softcap: expected a positive number"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \(4\)"),
        ({"sinks": torch.zeros(4).double()}, TypeError, "sinks: expected dtype torch.float32"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks: expected a Tensor"),
    ],
)
def test_bad_options_of_attend(
    scene: Scene, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with scene.cache.step({scene.a: 3}) as step:
        call = lambda: scene.cache.attend(0, **_tensors(), step=step, **options)  # noqa: E731
        scene.pair.raises(error, match, call)
        step.rollback()


# -- the constructor

GOOD: dict[str, Any] = {
    "num_layers": 2,
    "num_pages": 4,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"num_layers": 0}, ValueError, "num_layers: expected 1 to"),
        ({"num_pages": 0}, ValueError, "num_pages: expected 1 to"),
        ({"num_pages": 2**27}, ValueError, r"num_pages: expected fewer than 2\*\*31 slots"),
        ({"page_size": 0}, ValueError, "page_size: expected 1 to"),
        ({"page_size": 2.0}, TypeError, "page_size: expected an int"),
        ({"num_q_heads": 3}, ValueError, "num_q_heads: expected a multiple of num_kv_heads 2"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected 1 to"),
        ({"head_dim": [8]}, ValueError, "head_dim: expected one value or 2, got 1"),
        ({"head_dim_v": -1}, ValueError, "head_dim_v: expected 1 to"),
        ({"sliding_window": 0}, ValueError, "sliding_window: expected 1 to"),
        ({"sliding_window": [1, 2, 3]}, ValueError, "sliding_window: expected one value or 2"),
        (
            {"dtype": torch.int8},
            TypeError,
            "dtype: expected float32, bfloat16, float16 or float8_e4m3fn",
        ),
        ({"tail": "cow"}, ValueError, "tail: expected 'seal' or 'copy', got 'cow'"),
        ({"backend": "metal"}, ValueError, "backend: expected one of"),
        ({"backend": "flash_attn"}, Unsupported, "backend 'flash_attn'"),
        (
            {"batch_invariant": True, "backend": "reference"},
            Unsupported,
            "batch_invariant=True: backend 'reference'",
        ),
        ({"batch_invariant": 1}, TypeError, "batch_invariant: expected a bool, got int"),
        ({"num_workers": 0}, ValueError, "num_workers: expected 1 to"),
        ({"device": "cuda"}, Unsupported, "cuda"),
    ],
)
def test_what_a_cache_cannot_be_made_of(
    wrong: dict[str, Any], error: type[Exception], match: str
) -> None:
    ForkedKVCache(**GOOD)
    with pytest.raises(error, match=match):
        ForkedKVCache(**{**GOOD, **wrong})


def test_a_cache_without_kv_does_not_attend() -> None:
    cache = ForkedKVCache(**GOOD, device="meta", dtype=torch.float32)
    with cache.step({cache.new_branch(): 1}) as step:
        rows = torch.zeros(1, 2, 8)
        with pytest.raises(Unsupported, match="device 'meta' holds no KV"):
            cache.attend(0, torch.zeros(1, 4, 8), rows, rows, step)


# -- threads


class Meddler:
    """A number of tokens that runs something while the cache reads it."""

    def __init__(self, count: int, meddle: Callable[[], object]) -> None:
        self._count, self._meddle = count, meddle

    def __index__(self) -> int:
        self._meddle()
        return self._count


def _in_a_thread(call: Callable[[], object]) -> Exception | None:
    """What the call raises in a thread of its own."""
    caught: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as e:
            caught.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_a_second_thread_is_refused_while_a_verb_runs(scene: Scene) -> None:
    pair, cache = scene.pair, scene.cache
    errors: list[Exception | None] = []
    verbs: tuple[Callable[[], object], ...] = (
        cache.new_branch,
        scene.a.fork,
        scene.a.free,
        lambda: scene.a.crop(0),
        lambda: scene.root.join([scene.a]),
        lambda: setattr(scene.a, "position", 3),
        lambda: cache.step({scene.a: 1}),
    )

    def meddle() -> None:
        with pair.unchanged():
            errors.extend(_in_a_thread(verb) for verb in verbs)

    step = cache.step({scene.a: Meddler(2, meddle)})  # type: ignore[dict-item]
    assert [type(e) for e in errors] == [ConcurrentUse] * len(verbs)
    assert all("another thread is using this cache" in str(e) for e in errors)
    step.rollback()
    assert _in_a_thread(lambda: pair.step({scene.a: 1})) is None  # one after the other is fine
    pair.check()


def test_a_second_thread_is_refused_while_attention_runs(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fork_attn.ops as ops

    pair, cache = scene.pair, scene.cache
    errors: list[Exception | None] = []
    attention = ops.run_tree_attention
    counts = {scene.a: Draft((-1, -1, 1, 2))}
    rows = pair.rows(counts, {scene.a: [1, 2, 3]})
    step = cache.step(counts)
    step.accept([1, 2, 3])

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls = (step.commit, scene.a.fork, lambda: cache.attend(1, **_tensors(4), step=step))
        errors.extend(_in_a_thread(call) for call in calls)
        return attention(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "run_tree_attention", slow)
        pair.attend(rows, step)
    assert [type(e) for e in errors] == [ConcurrentUse] * 6  # in both layers
    pair.raises(ConcurrentUse, "another thread", lambda: _commit_while_busy(scene, step))
    step.commit()  # must not move the accepted tokens a second time
    pair.oracle.step(rows)
    pair.check()


def _commit_while_busy(scene: Scene, step: Step) -> None:
    scene.cache._core.enter()
    try:
        step.commit()
    finally:
        scene.cache._core.leave()
