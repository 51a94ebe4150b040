"""Random groups of branches that watch each other, against the oracle's explicit views."""

from __future__ import annotations

import random

import pytest
from cache_pair import CachePair
from kv_table import KVTable, Model

from fork_attn import Branch, Draft, OutOfPages

MODEL = Model(windows=(None, 5, None))
TABLE = KVTable(MODEL)


class Walk:
    """Few branches, many watches: every step attends, every operation is compared."""

    def __init__(self, seed: int, page_size: int, backend: str) -> None:
        self.rng = random.Random(seed)
        self.pair = CachePair(
            MODEL,
            num_pages=self.rng.choice([40, 400]),
            page_size=page_size,
            tail=self.rng.choice(["seal", "copy"]),
            table=TABLE,
            backend=backend,
            num_workers=self.rng.choice([1, 3]),
        )
        root = self.pair.new_branch()
        self.pair.step({root: self.rng.randint(1, 9)})
        self.pair.fork(root, 2)

    def some(self) -> list[Branch]:
        live = list(self.pair.ids)
        return self.rng.sample(live, self.rng.randint(1, len(live)))

    def watched(self, branch: Branch) -> bool:
        return self.pair.oracle.is_watched(self.pair.ids[branch])

    def act(self) -> None:
        verbs = [self.step] * 6 + [self.watch] * 4 + [self.fork, self.join, self.trim, self.free]
        self.rng.choice(verbs)()
        self.pair.check()

    def step(self) -> None:
        rng, pair = self.rng, self.pair
        counts: dict[Branch, int | Draft] = {b: rng.choice([1, 1, 1, 2, 4]) for b in self.some()}
        for branch in list(counts):
            alone = not any(pair.watches(a, b) for a in counts for b in counts if branch in (a, b))
            if alone and rng.random() < 0.2:
                counts[branch] = Draft([rng.randint(-1, i - 1) for i in range(rng.randint(1, 4))])
        try:
            pair.step(counts, attend=True)
        except OutOfPages:
            pair.free(*list(pair.ids)[1::2])

    def watch(self) -> None:
        branch, other = (self.rng.choice(list(self.pair.ids)) for _ in "ab")
        if branch is not other and not self.pair.watches(branch, other):
            lag = self.rng.choice([0, 0, 0, 1, 2, 9])
            self.pair.watch(branch, other, lag, self.rng.random() < 0.7)

    def fork(self) -> None:
        if len(self.pair.ids) < 6:
            branch = self.rng.choice(list(self.pair.ids))
            if self.rng.random() < 0.5:
                self.pair.fork(branch, self.rng.randint(1, 2))
            else:
                self.pair.fork_at(branch, self.rng.randint(0, branch.length))

    def join(self) -> None:
        parent, *children = self.some()
        rebase = self.rng.choice([False, True, "copy"])
        ids = [self.pair.ids[b] for b in children]
        if children and not self.watched(parent):
            if self.pair.oracle.conflict(self.pair.ids[parent], ids):
                self.pair.raises(ValueError, "two different", lambda: parent.join(children))
                return
            try:
                self.pair.join(parent, children, "max", rebase)
            except OutOfPages:
                return

    def trim(self) -> None:
        branch = self.rng.choice(list(self.pair.ids))
        if self.watched(branch):
            return
        start, end = sorted(self.rng.randint(0, branch.length) for _ in "ab")
        how = self.rng.choice(["crop", "excise", "position"])
        if how == "crop":
            self.pair.crop(branch, end)
        elif how == "excise":
            self.pair.excise(branch, start, end)
        else:
            self.pair.set_position(branch, branch.position + self.rng.randint(0, 3))

    def free(self) -> None:
        if len(self.pair.ids) > 2:
            self.pair.free(*self.rng.sample(list(self.pair.ids), self.rng.randint(1, 2)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_random_watches_equal_the_oracle(page_size: int, backend: str) -> None:
    for seed in range(12):
        walk = Walk(seed, page_size, backend)
        for _ in range(40):
            walk.act()
        walk.pair.free(*walk.pair.ids)
        assert walk.pair.cache.stats().pages_live == 0
