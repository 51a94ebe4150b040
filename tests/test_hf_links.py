"""Joins at new positions and branches that watch each other, through transformers models."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hf_models import MODELS, build, random_tokens
from hf_views import ViewPair

from fork_attn import Branch, Rope, Unsupported, hf

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
# Seeing the tokens elsewhere must move the logits by more than this, or nothing would be shown.
CONTROL = 1e-2

FULL = [Rope.from_base(16)] * 2
# What each model does to its keys, from its paper or card: not from what the package finds.
ROPES: dict[str, tuple[list[Rope], dict[str, Any]]] = {
    "llama": (FULL, {}),
    "qwen3": (FULL, {}),
    "mistral": (FULL, {}),
    "gemma3_text": ([Rope.from_base(16), Rope.from_base(16, 1e6)], {}),
    "phi": ([Rope.from_base(8)] * 2, {}),
    "gpt_neox": ([Rope.from_base(4)] * 2, {}),
    "glm4": ([Rope.from_base(8, interleaved=True)] * 2, {}),
    "cohere2": ([Rope.from_base(16, interleaved=True), Rope.none()], {}),
    "smollm3": (
        [Rope.from_base(16, 2e6)] * 3 + [Rope.none()],
        {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    ),
    "deepseek_v3": ([Rope.from_base(8, start=16)] * 2, {}),
    "linear": (
        [Rope(tuple(f / 4 for f in Rope.from_base(16).inv_freq))] * 2,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
}


def pair_of(name: str, **options: Any) -> ViewPair:
    ropes, extra = ROPES[name]
    model = build("llama" if name == "linear" else name, **extra)
    return ViewPair(model, ropes, num_pages=64, page_size=4, **options)


def read_facts(pair: ViewPair) -> tuple[Branch, list[Branch]]:
    """A prompt and three children of different lengths."""
    root = pair.new_branch()
    pair.feed({root: random_tokens(9, seed=1)})
    children = pair.fork(root, 3)
    pair.feed({c: random_tokens(n, seed=n) for c, n in zip(children, (2, 5, 3), strict=True)})
    return root, children


def go_on(pair: ViewPair, branch: Branch) -> None:
    pair.feed({branch: random_tokens(3, seed=5)})
    for i in range(2):
        pair.feed({branch: random_tokens(1, seed=50 + i)})


@pytest.mark.parametrize("rebase", [True, "copy"])
@pytest.mark.parametrize("name", ROPES)
def test_joins_end_to_end_are_exact(name: str, rebase: bool | Literal["copy"]) -> None:
    pair = pair_of(name)
    root, children = read_facts(pair)
    pair.join(root, children, rebase=rebase)
    assert root.positions.tolist() == list(range(19)) and root.position == 19
    go_on(pair, root)
    (again,) = pair.fork(root, 1)
    pair.feed({root: [7], again: [8, 9]})
    pair.join(root, [again], rebase=rebase)
    pair.excise(root, 4, 12)
    assert root.positions.tolist() == list(range(root.length))
    go_on(pair, root)
    assert pair.max_error <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_check_of_joins_can_fail(name: str) -> None:
    pair = pair_of(name)
    root, children = read_facts(pair)
    root.join(children, rebase=True)
    pair.oracle.join(pair.ids[root], [pair.ids[c] for c in children], 19)  # where they were
    go_on(pair, root)
    assert pair.max_error > CONTROL


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", ROPES)
def test_workers_that_see_each_other_are_exact(name: str, lag: int) -> None:
    pair = pair_of(name)
    root = pair.new_branch()
    pair.feed({root: random_tokens(7, seed=1)})
    workers = pair.fork(root, 3)
    pair.watch_each_other(workers, lag=lag)
    pair.feed({w: random_tokens(2 + i, seed=2 + i) for i, w in enumerate(workers)})
    for i in range(4):
        pair.feed({w: random_tokens(1, seed=20 + 3 * i + j) for j, w in enumerate(workers)})
    pair.feed({workers[0]: [5, 6]})  # the others wait
    pair.free(workers[1])  # what it wrote stays
    rest = [workers[0], workers[2]]
    (child,) = pair.fork(workers[2], 1)
    pair.feed({child: [3], **{w: random_tokens(1, seed=40 + j) for j, w in enumerate(rest)}})
    pair.join(root, rest, rebase=True)
    go_on(pair, root)
    assert pair.max_error <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt"])
def test_thinkers_with_ranges_of_positions_are_exact(name: str) -> None:
    ropes = ROPES[name][0] if name in ROPES else [Rope.none()] * 2
    pair = ViewPair(build(name), ropes, num_pages=64, page_size=4)
    root = pair.new_branch()
    pair.feed({root: random_tokens(7, seed=1)})
    thinkers = pair.fork(root, 3)
    for i, thinker in enumerate(thinkers):
        thinker.position = 10 + 20 * i
        pair.oracle.set_position(pair.ids[thinker], 10 + 20 * i)
    pair.watch_each_other(thinkers, rebase=False)
    for i in range(5):
        pair.feed(
            {t: random_tokens(1 + i % 2, seed=20 + 3 * i + j) for j, t in enumerate(thinkers)}
        )
    assert pair.max_error <= TOLERANCE


def test_the_check_of_watches_can_fail() -> None:
    pair = pair_of("llama")
    root = pair.new_branch()
    pair.feed({root: random_tokens(7, seed=1)})
    a, b = pair.fork(root, 2)
    a.watch(b)
    pair.oracle.watch(pair.ids[a], pair.ids[b], rebase=False)
    pair.feed({b: [3, 4]})
    pair.feed({a: [5]})
    assert pair.max_error > CONTROL


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_understood_or_refused_by_name(name: str) -> None:
    model = build(name)
    cache = hf.attach(model, num_pages=16, page_size=4)
    root = cache.new_branch()
    hf.forward(model, {root: [3, 4]})
    a, b = root.fork(2)
    hf.forward(model, {a: [5], b: [6]})
    before = cache._core.digest()
    if name not in ("gpt2", "opt", "gpt_bigcode", "hunyuan_v1_dense"):
        root.join([a, b], rebase=True)
        return
    message = f"layer 0 of {type(model).__name__} do not turn with their positions"
    for call in (
        lambda: root.join([a, b], rebase=True),
        lambda: root.join([a, b], rebase="copy"),
        lambda: a.watch(b),
        lambda: root.excise(0, 1, rebase=True),
    ):
        with pytest.raises(Unsupported, match=message):
            call()
    assert cache._core.digest() == before


def test_a_failed_join_takes_back_what_watched_children_were_fed() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=32, page_size=4)
    root = cache.new_branch()
    hf.forward(model, {root: [3, 4, 5]})
    a, b = root.fork(2)
    a.watch(b)
    b.watch(a)
    hf.forward(model, {a: [5, 6], b: [6]})
    with pytest.raises(ValueError, match="position: expected"):
        hf.join(root, [a, b], pending={a: 7, b: 8}, position="nowhere")
    assert (a.length, a.position, b.length, b.position) == (5, 5, 4, 4)
    cache.check()
    hf.join(root, [a, b], pending={a: 7, b: 8}, rebase=True)
    assert root.length == root.position == 8


def test_a_model_that_is_gone_is_refused() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=16, page_size=4)
    root = cache.new_branch()
    hf.forward(model, {root: [3, 4]})
    del model
    with pytest.raises(Unsupported, match="LlamaForCausalLM is gone"):
        root.excise(0, 1, rebase=True)


def test_bf16_models_are_understood() -> None:
    model = build("gemma3_text").to(torch.bfloat16)
    cache = hf.attach(model, num_pages=16, page_size=4)
    assert cache._find_ropes is not None
    got = [rope.inv_freq[1] for rope in cache._find_ropes()]
    assert got == pytest.approx([10000.0 ** (-1 / 8), 1e6 ** (-1 / 8)], rel=1e-2)
