"""Forks, joins and drafts through a transformers model, exact against one stock eager forward."""

from __future__ import annotations

import itertools

import pytest
import torch
from hf_models import MODELS, Oracle, build, random_tokens

from fork_attn import hf

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
# Leaving a child out must move the logits by more than this, or the check would show nothing.
CONTROL = 1e-2


def _read_facts(oracle: Oracle) -> tuple[object, list[object]]:
    """A prompt, three children that read different lengths, and a few ragged decode steps."""
    root = oracle.new_branch()
    oracle.feed({root: random_tokens(18, seed=1)})
    children = oracle.fork(root, 3)
    oracle.feed({c: random_tokens(n, seed=n) for c, n in zip(children, (2, 5, 3), strict=True)})
    for i in range(6):
        oracle.feed({c: random_tokens(1, seed=20 + 3 * i + j) for j, c in enumerate(children)})
    return root, children


@pytest.mark.parametrize("name", MODELS)
def test_fork_and_join_are_exact(name: str) -> None:
    oracle = Oracle(build(name), num_pages=64, page_size=4)
    root, children = _read_facts(oracle)
    assert oracle.max_error() <= TOLERANCE
    own = set(oracle.contexts[children[1]]) - set(oracle.contexts[root])
    oracle.join(root, children, pending={c: 7 + i for i, c in enumerate(children)})
    oracle.feed({root: random_tokens(4, seed=5)})
    for i in range(3):
        oracle.feed({root: random_tokens(1, seed=50 + i)})
    assert oracle.max_error() <= TOLERANCE
    # The same reference, but the parent does not see the second child.
    oracle.hide(own, since=len(oracle.tokens) - 7)
    assert oracle.max_error() > CONTROL


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("tail", ["seal", "copy"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_nested_forks_and_joins_are_exact(name: str, tail: str, page_size: int) -> None:
    oracle = Oracle(build(name), num_pages=256, page_size=page_size, tail=tail)
    root = oracle.new_branch()
    oracle.feed({root: random_tokens(7, seed=1)})
    left, right = oracle.fork(root, 2)
    oracle.feed({left: random_tokens(3, seed=2), right: random_tokens(1, seed=3)})
    deep = oracle.fork(left, 2)
    oracle.feed({root: [9], **{c: random_tokens(2 + i, seed=4 + i) for i, c in enumerate(deep)}})
    oracle.join(left, deep, pending={deep[1]: 11})
    oracle.feed({left: random_tokens(5, seed=6), right: random_tokens(2, seed=7)})
    oracle.join(root, [right, left], pending={left: 12, right: 13})
    oracle.feed({root: random_tokens(3, seed=8)})
    assert oracle.max_error() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text", "gpt2"])
def test_draft_is_verified_in_one_forward(name: str) -> None:
    oracle = Oracle(build(name), num_pages=64, page_size=4)
    root = oracle.new_branch()
    oracle.feed({root: random_tokens(10, seed=1)})
    #      0 - 1 - 2
    # root        \ 3
    #      4 - 5
    parents = [-1, 0, 1, 1, -1, 4]
    oracle.feed_draft(root, random_tokens(6, seed=2), parents, path=[0, 1, 3])
    assert root.length == 13
    oracle.feed({root: random_tokens(2, seed=3)})
    oracle.feed_draft(root, random_tokens(2, seed=4), [-1, -1], path=[])
    oracle.feed({root: random_tokens(1, seed=5)})
    assert oracle.max_error() <= TOLERANCE


def test_last_logits_are_the_last_rows_of_all() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=32, page_size=4)
    branches = [cache.new_branch() for _ in range(3)]
    tokens = {b: random_tokens(n, seed=n) for b, n in zip(branches, (3, 1, 4), strict=True)}
    last = hf.forward(model, tokens)
    cache.free(branches)
    again = dict(zip((cache.new_branch() for _ in range(3)), tokens.values(), strict=True))
    every = hf.forward(model, again, logits="all")
    ends = [n - 1 for n in itertools.accumulate(len(t) for t in tokens.values())]
    assert last.shape == (3, 97) and every.shape == (8, 97)
    assert not last.requires_grad
    torch.testing.assert_close(last, every[ends], rtol=0, atol=1e-5)


def test_join_takes_fed_tokens_back_when_it_fails() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=32, page_size=4)
    root = cache.new_branch()
    hf.forward(model, {root: random_tokens(6, seed=1)})
    child = root.fork()[0]
    hf.forward(model, {child: [5, 6]})
    child.position = 20
    with pytest.raises(ValueError):
        hf.join(root, [child], pending={child: 7}, position="nowhere")
    assert (child.length, child.position, root.length) == (8, 20, 6)
    with pytest.raises(ValueError, match="pending"):
        hf.join(root, [child], pending={root: 7})
    assert (child.length, child.position, root.length) == (8, 20, 6)
    hf.join(root, [child], pending={child: 7})
    assert (root.length, root.position) == (9, 21)


def test_tokens_are_sent_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a GPU: by way of pinned memory, as all that the cache sends."""
    model = build("llama")
    root = hf.attach(model, num_pages=8).new_branch()
    storage = root.cache._storage
    send, sent = storage.sent, []

    def record(host: torch.Tensor) -> torch.Tensor:
        sent.append(host.tolist())
        return send(host)

    monkeypatch.setattr(storage, "sent", record)
    hf.forward(model, {root: [3, 5, 8]})
    hf.forward(model, {root: [13, 21]}, logits=[1])
    assert sent == [[[3, 5, 8]], [1], [[13, 21]]]
