"""`cache.attend` against float64 attention over the deep-copy oracle, on random trees and DAGs.

Slots that nobody sees hold NaN throughout.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest
import torch
from cache_pair import CachePair
from kv_table import Model

from fork_attn import Branch, Draft

Tail = Literal["seal", "copy"]
TAILS: tuple[Tail, ...] = ("seal", "copy")

MODELS = {
    "plain": Model(2, 2, 8, windows=(None,)),
    "group 2, windows": Model(4, 2, 16, windows=(None, 1, 7)),
    "group 3, D != Dv": Model(6, 2, 16, 24, windows=(None, 9)),
    "group 7, D > Dv": Model(7, 1, 20, 4, windows=(5,)),
    "group 16": Model(16, 1, 64, windows=(None,)),
    "odd dims": Model(3, 3, 5, 3, windows=(None, 4)),
    "bf16": Model(6, 2, 32, 16, windows=(None, 6), dtype=torch.bfloat16),
    "fp16": Model(4, 1, 16, windows=(None, 12), dtype=torch.float16),
}


def tree_draft(pick: random.Random, n: int) -> tuple[Draft, list[int]]:
    """A random draft tree and a path from its root."""
    parents = [pick.randrange(-1, i) for i in range(n)]
    path: list[int] = []
    at = pick.randrange(-1, n)
    while at >= 0:
        path.insert(0, at)
        at = parents[at]
    return Draft(parents), path


class Grower:
    """Grows a random DAG of branches; every step attends in all layers."""

    def __init__(self, pair: CachePair, **options: Any) -> None:
        self.pair, self.options = pair, options
        self.pick = random.Random(torch.randint(2**31, ()).item())
        self.step({pair.new_branch(): 1 + self.pick.randrange(9)})

    def step(
        self, counts: dict[Branch, int | Draft], accept: dict[Branch, list[int]] | None = None
    ) -> None:
        self.pair.step(counts, accept, attend=True, **self.options)
        self.pair.check()

    def some(self, most: int) -> list[Branch]:
        live = list(self.pair.ids)
        return self.pick.sample(live, min(len(live), self.pick.randint(1, most)))

    def reshape(self) -> None:
        pair, pick = self.pair, self.pick
        (branch,) = self.some(1)
        verb = pick.choice(
            ["fork", "fork", "fork", "fork_at", "join", "crop", "excise", "position"]
        )
        if verb == "fork" and len(pair.ids) < 9:
            pair.fork(branch, pick.randint(1, 3))
        elif verb == "fork_at" and len(pair.ids) < 9:
            pair.fork_at(branch, pick.randint(0, branch.length))
        elif verb == "join" and len(pair.ids) > 3:
            children = [b for b in self.some(3) if b is not branch]
            if children:
                pair.join(branch, children, pick.choice(["max", "sum", 3]))
        elif verb == "crop":
            pair.crop(branch, pick.randint(branch.length // 2, branch.length))
        elif verb == "excise":
            start, end = sorted(pick.randint(0, branch.length) for _ in range(2))
            pair.excise(branch, start, min(end, start + 6))
        elif verb == "position":
            pair.set_position(branch, max(0, branch.position + pick.randint(-5, 20)))

    def grow(self, rounds: int) -> None:
        pick = self.pick
        for _ in range(rounds):
            for _ in range(3):
                self.reshape()
            kind = pick.choice(["decode", "decode", "chunks", "draft"])
            if kind == "decode":
                self.step(dict.fromkeys(self.some(9), 1))
            elif kind == "chunks":
                self.step({b: pick.randint(1, 20) for b in self.some(4)})
            else:
                counts: dict[Branch, int | Draft] = dict.fromkeys(self.some(3), 1)
                branch = pick.choice(list(counts))
                counts[branch], path = tree_draft(pick, pick.randint(1, 9))
                self.step(counts, {branch: path})


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", MODELS)
def test_random_dags(name: str, tail: Tail) -> None:
    pair = CachePair(MODELS[name], num_pages=600, page_size=4, tail=tail)
    Grower(pair).grow(15)
    pair.assert_precise()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_sizes(page_size: int, tail: Tail) -> None:
    pair = CachePair(
        Model(4, 2, 8, windows=(None, 6)), num_pages=800, page_size=page_size, tail=tail
    )
    Grower(pair).grow(12)
    pair.assert_precise()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softmax_scale": 0.7},
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
        {"sinks": torch.tensor([-9.0, 2.0, 1.0, 0.0]), "softcap": 5.0, "softmax_scale": 0.4},
    ],
    ids=["softcap", "scale", "sinks", "all"],
)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = Model(4, 2, 16, windows=(None, 3), dtype=dtype)
    pair = CachePair(model, num_pages=400, page_size=4)
    Grower(pair, **options).grow(10)
    pair.assert_precise()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends(backend: str) -> None:
    pair = CachePair(MODELS["group 3, D != Dv"], num_pages=400, page_size=4, backend=backend)
    Grower(pair).grow(8)
    pair.assert_precise()


@pytest.mark.parametrize("tail", TAILS)
def test_prefill_in_chunks_wider_than_a_row_block(tail: Tail) -> None:
    pair = CachePair(Model(6, 2, 8, windows=(None, 40)), num_pages=300, page_size=4, tail=tail)
    grower = Grower(pair)
    (root,) = pair.ids
    for chunk in (63, 64, 65, 150):
        grower.step({root: chunk})
    children = pair.fork(root, 3)
    grower.step(
        {children[0]: 70, root: 66, children[1]: 1, children[2]: tree_draft(grower.pick, 64)[0]}
    )
    pair.assert_precise()


def test_more_branches_than_a_row_block_holds() -> None:
    pair = CachePair(Model(2, 1, 8, windows=(None, 30)), num_pages=400, page_size=16)
    grower = Grower(pair)
    (root,) = pair.ids
    grower.step({root: 50})
    middle = pair.fork(root, 3)
    grower.step({b: 5 + i for i, b in enumerate(middle)})
    leaves = [leaf for b in middle for leaf in pair.fork(b, 50)]
    for _ in range(2):
        grower.step(dict.fromkeys(leaves, 1))
    pair.assert_precise()


@pytest.mark.parametrize("tail", TAILS)
def test_a_deep_tree_decodes_all_its_nodes_at_once(tail: Tail) -> None:
    pair = CachePair(Model(4, 2, 8, windows=(None, 10)), num_pages=400, page_size=3, tail=tail)
    grower = Grower(pair)
    spine = list(pair.ids)
    for depth in range(22):
        (child,) = pair.fork(spine[-1])
        spine.append(child)
        grower.step({child: 1 + depth % 3})
    grower.step(dict.fromkeys(spine, 1))
    while len(spine) > 1:
        child = spine.pop()
        pair.join(spine[-1], [child])
    grower.step({spine[0]: 3})
    pair.assert_precise()


def test_first_tokens_of_empty_contexts() -> None:
    pair = CachePair(Model(4, 2, 8, windows=(None, 1)))
    grower = Grower(pair)
    fresh = [pair.new_branch() for _ in range(3)]
    grower.step({fresh[0]: 1, fresh[1]: 4, fresh[2]: Draft((-1, -1, 0))})
    pair.assert_precise()


def test_a_window_goes_by_position_not_by_order() -> None:
    pair = CachePair(Model(2, 1, 8, windows=(4,)))
    grower = Grower(pair)
    (root,) = pair.ids
    far, near = pair.fork(root, 2)
    pair.set_position(far, 500)
    grower.step({far: 3, near: 2})
    pair.join(root, [far, near], 20)  # sees keys far ahead of it, and none behind it but its own
    grower.step({root: 6})
    pair.assert_precise()


@pytest.mark.parametrize("num_workers", [1, 3, 64])
def test_the_number_of_workers_changes_no_result(num_workers: int) -> None:
    pair = CachePair(Model(4, 2, 8), num_pages=300, num_workers=num_workers)
    Grower(pair).grow(8)
    pair.assert_precise()


def test_the_oracle_would_notice_one_key_too_many_or_too_few() -> None:
    """The comparison itself: a cache whose context was changed behind the oracle's back."""
    for change in (lambda b: b.crop(8), lambda b: b.excise(3, 4)):
        pair = CachePair(Model(2, 1, 8, windows=(None,)))
        grower = Grower(pair)
        (root,) = pair.ids
        grower.step({root: 9})
        position = root.position
        change(root)
        root.position = position
        step = pair.cache.step({root: 1})
        with pytest.raises(AssertionError):
            pair.attend(pair.rows({root: 1}), step)
        step.rollback()
