"""DecodeGraph's bookkeeping, run without a graph: token for token what `hf.forward` gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hf_models import build, random_tokens
from hf_twins import Twins

from fork_attn import PlanCapacityExceeded, StaleBranch, Unsupported, hf
from fork_attn.hf import decode_graph

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_decoding_equals_forward_over_forks_joins_and_frees(name: str, tail: str) -> None:
    Twins(name, tail).live()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_decoding_equals_forward_in_a_batch_invariant_cache(name: str) -> None:
    twins = Twins(name, batch_invariant=True)
    assert all(cache.batch_invariant for cache in twins.caches)
    twins.live()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_decoding_equals_forward_over_rebased_joins(name: str) -> None:
    twins = Twins(name)
    twins.prefill(random_tokens(7, seed=1))
    twins.fork(0, 4)
    for _ in range(3):
        twins.decode()
    twins.join(0, [1, 2, 3], rebase=True)
    for _ in range(3):
        twins.decode()
    twins.fork(0, 3)
    twins.decode()
    twins.join(1, [2, 3], rebase=True)
    twins.decode()
    twins.free([1])
    twins.decode()
    assert {shifted for _, shifted in twins.graph._runs} == {False, True}
    for cache in twins.caches:
        cache.check()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_decoding_equals_forward_while_branches_watch_each_other(name: str, lag: int) -> None:
    twins = Twins(name)
    twins.prefill(random_tokens(7, seed=1))
    twins.fork(0, 3)
    twins.decode()
    twins.watch_each_other([1, 2, 3], lag)
    for _ in range(6):  # what a watch shows grows with each token
        twins.decode()
    twins.decode([1, 3])
    twins.free([2])
    for _ in range(2):
        twins.decode()
    for cache in twins.caches:
        cache.check()


def test_what_does_not_fit_is_refused_and_stores_nothing() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=50)
    with pytest.raises(Unsupported, match="needs a model on a CUDA device"):
        hf.DecodeGraph(model, max_width=4)
    graph = hf.DecodeGraph(model, max_width=5, capture=False)
    assert graph.widths == (1, 2, 4, 5)
    root = cache.new_branch()
    hf.forward(model, {root: [1, 2, 3]})
    many = root.fork(6)
    before = cache._core.digest()
    with pytest.raises(PlanCapacityExceeded, match="expected at most 5 branches, got 6"):
        graph(dict.fromkeys(many, 1))
    with pytest.raises(ValueError, match="tokens: branch 1"):
        graph({many[0]: 1, many[1]: 10**6})
    small = hf.DecodeGraph(model, max_width=4, capture=False, max_plan_bytes=256)
    with pytest.raises(PlanCapacityExceeded, match="bytes of a plan"):
        small({root: 1})
    assert cache._core.digest() == before
    few = hf.DecodeGraph(model, max_width=4, capture=False, max_rotations=0)
    many[0].watch(many[1])
    hf.forward(model, {many[1]: [5]})
    before = cache._core.digest()
    with pytest.raises(
        PlanCapacityExceeded, match="rotated query rows of a plan: expected at most"
    ):
        few({many[0]: 1})
    assert cache._core.digest() == before
    cache.free(many)
    with pytest.raises(StaleBranch):
        graph({many[0]: 1})
    assert graph({root: 4}).shape == (1, model.config.vocab_size)


def test_captures_and_replays_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be current. With a fake torch.cuda, whose graphs run nothing."""
    model = build("llama")
    root = hf.attach(model, num_pages=20).new_branch()
    graph = hf.DecodeGraph(model, max_width=4, capture=False)
    graph._capture = True
    where: list[torch.device] = []  # that are current, innermost last
    log: list[object] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        where.append(device)
        yield
        where.pop()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            log.append("a stream is made")

        def wait_stream(self, other: object) -> None:
            pass

    class Graph:
        def pool(self) -> int:
            return 7

        def replay(self) -> None:
            log.append(("replay", list(where)))

    @contextmanager
    def capture(graph: Graph, pool: int | None, stream: object) -> Iterator[None]:
        log.append(("capture", list(where), pool, type(stream)))
        yield

    monkeypatch.setattr(decode_graph, "current", current)
    own = Stream(model.device)
    log.clear()
    fake = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda _: nullcontext(),
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own)
    graph({root: 1})
    graph({root: 2})
    graph(dict.fromkeys(root.fork(2), 3))
    here, replay = [model.device], ("replay", [model.device])
    assert log == [
        *("a stream is made", ("capture", here, None, Stream), replay, replay),
        *(("capture", here, 7, Stream), replay),
    ]


def test_widths() -> None:
    from fork_attn.hf.decode_graph import _widths

    assert _widths(1) == (1,)
    assert _widths(64) == (1, 2, 4, 8, 16, 32, 64)
    assert _widths(200) == (1, 2, 4, 8, 16, 32, 64, 128, 192, 200)


def test_a_model_that_is_not_attached_is_refused() -> None:
    with pytest.raises(Unsupported, match="is not attached"):
        hf.DecodeGraph(build("llama"), max_width=2, capture=False)
