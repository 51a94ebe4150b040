"""The suite's shapes, declared once: families S, N, U, T, E, J and R.

S: one shared prefix. N: nested trees. U: nothing shared. T: draft trees to verify. E: many new
tokens per branch. J: fork, join, fork again. R: random trees, by seed. `[1,256]x[256,32]` is one
node of 256 tokens and 256 of 32 below it. Sources: FastTree (MLSys 2025), PAT (arXiv 2511.22333),
DeFT (arXiv 2404.00242), FlashInfer's and TensorRT-LLM's published settings; the others are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from fork_attn.bench.forest import Forest, Node, Query, sorted_forest, uniform


@dataclass(frozen=True)
class Shape:
    """A named tree of contexts.

    Attributes:
        id: such as "S2"; its first letter is the family.
        text: what it is, for people.
        make: builds the forest.
        cpu: "quick": measured on CPUs always; "full": unless --quick; "no": only where it is named.
    """

    id: str
    text: str
    make: Callable[[], Forest]
    cpu: str = "no"

    @property
    def family(self) -> str:
        return self.id[0]


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, size of a head."""

    q: int
    kv: int
    dim: int = 128

    @property
    def group(self) -> int:
        return self.q // self.kv

    def __str__(self) -> str:
        return f"{self.q}/{self.kv}x{self.dim}"

    @staticmethod
    def parse(text: str) -> Heads:
        """Reads `32/8x128`.

        Raises:
            ValueError: not of that form, or no multiple.
        """
        try:
            heads, _, dim = text.partition("x")
            q, kv = (int(n) for n in heads.split("/"))
            found = Heads(q, kv, int(dim or 128))
        except ValueError:
            raise ValueError(f"heads: expected like 32/8x128, got {text!r}") from None
        if found.kv < 1 or found.q < 1 or found.dim < 1 or found.q % found.kv:
            raise ValueError(f"heads: expected a multiple of the KV heads, got {text!r}")
        return found


HEADS = tuple(map(Heads.parse, ("32/8", "64/8", "8/1", "32/32", "16/8", "16/1", "9/3x64")))
"""The suite's settings; the first is what is measured unless others are named."""
PAGE_SIZES = (16, 64)

_LEVELS = {
    "S1": ([1, 10], [4000, 400], "quick"),
    "S2": ([1, 256], [256, 32], "full"),
    "S3": ([1, 1024], [2048, 32], "no"),
    "S4": ([1, 256], [32768, 256], "no"),
    "S5-20": ([1, 20], [4000, 200], "no"),
    "S5-30": ([1, 30], [4000, 200], "no"),
    "S5-50": ([1, 50], [4000, 200], "full"),
    "S6": ([1, 8], [4000, 32], "quick"),
    "S7a": ([1, 128], [128, 3], "no"),
    "S7b": ([1, 128], [1024, 3], "full"),
    "S7c": ([1, 128], [4096, 3], "no"),
    "S7d": ([1, 5000], [512, 64], "no"),
    "S8": ([32, 512], [1024, 4096], "no"),
    "N1": ([1, 16, 64], [1024, 256, 32], "quick"),
    "N2": ([1, 4, 16, 512], [1024, 256, 128, 32], "no"),
    "N2s": ([1, 4, 16, 64], [1024, 256, 128, 32], "full"),
    "N3": ([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256], "no"),
    "N4": ([1, 2, 4, 8, 16, 32, 64, 128, 1024], [16] * 9, "no"),
    "N4s": ([1, 2, 4, 8, 16, 32, 64, 128], [16] * 8, "full"),
    "N5": ([1, 8, 16, 32, 64, 128, 1024], [256, 128, 64, 16, 16, 16, 16], "no"),
    "N6": ([8, 16, 32, 256], [512, 512, 256, 32], "full"),
    "N7": ([1, 8, 512], [32, 2048, 256], "no"),
    "U1": ([256], [1024], "no"),
    "U1s": ([8], [1024], "quick"),
    "U2": ([256], [4096], "no"),
    "U3": ([1], [32768], "full"),
    "U3s": ([1], [4096], "quick"),
}
_EXTENDS = {
    "E-N1-16": ([1, 16, 64], [1024, 256, 32], 16, "no"),
    "E-N1-128": ([1, 16, 64], [1024, 256, 32], 128, "no"),
    "E-N1-512": ([1, 16, 64], [1024, 256, 32], 512, "no"),
    "E-N2-16": ([1, 4, 16, 512], [1024, 256, 128, 32], 16, "no"),
    "E-N2-128": ([1, 4, 16, 512], [1024, 256, 128, 32], 128, "no"),
    "E-S6-16": ([1, 8], [4000, 32], 16, "full"),
}


def _halving(depth: int) -> list[int]:
    """Nodes per level of a tree of that many levels with 32 leaves."""
    return [2 ** round(5 * level / (depth - 1)) for level in range(depth)] if depth > 1 else [32]


# Lengths for the charts: one thing varies, the rest stays.
_SWEEPS = {
    **{f"S-w{n}": ([1, n], [4096, 64], "full") for n in (1, 2, 4, 8, 16, 32, 64)},
    **{f"S-p{p}": ([1, 8], [p, 64], "full") for p in (1024, 2048, 8192, 16384)},
    **{f"N-d{d}": (_halving(d), [2048 // d] * d, "full") for d in (1, 2, 3, 4, 6)},
}


def draft_tree(size: int, seed: int) -> tuple[int, ...]:
    """Parents of a random draft tree of that many tokens, no deeper than an EAGLE-2 tree."""
    rng = random.Random(seed)
    return (-1, *(rng.randint(max(-1, i - 10), i - 1) for i in range(1, size)))


def ragged(seed: int, leaves: int = 200, most_tokens: int = 700, prefix: int = 1001) -> Forest:
    """A random tree with skewed fan-out and lengths off the pages' multiples."""
    rng = random.Random(seed)
    nodes, ends = [Node((), prefix)], [0]
    while len(ends) < leaves:
        parent = ends.pop(rng.randrange(len(ends)))
        fan = min(1 + int(rng.paretovariate(1.0)), 40)
        for _ in range(fan):
            ends.append(len(nodes))
            nodes.append(Node((parent,), 1 + int(rng.paretovariate(0.8)) % most_tokens))
    return sorted_forest(nodes, [Query(node) for node in ends])


def joined(width: int, tokens: int) -> Forest:
    """Fork, join, fork again; every segment has as many tokens."""
    nodes = [Node((), tokens), *(Node((0,), tokens) for _ in range(width))]
    nodes.append(Node(tuple(range(1, width + 1)), tokens))
    joint = width + 1
    nodes += [Node((joint,), tokens) for _ in range(width)]
    return sorted_forest(nodes, [Query(node) for node in range(joint + 1, len(nodes))])


def _verify(prefix: int, batch: int, draft: int) -> Forest:
    return uniform([batch], [prefix], draft=draft_tree(draft, draft))


def _text(nodes: list[int], tokens: list[int]) -> str:
    def short(numbers: list[int]) -> str:
        same = len(set(numbers)) == 1 and len(numbers) > 1
        return f"[{numbers[0]} each]" if same else "[" + ",".join(map(str, numbers)) + "]"

    return f"{short(nodes)}x{short(tokens)}"


def _all() -> Iterator[Shape]:
    for name, (nodes, tokens, cpu) in {**_LEVELS, **_SWEEPS}.items():
        yield Shape(name, _text(nodes, tokens), _uniform(nodes, tokens), cpu)
    for name, (nodes, tokens, new, cpu) in _EXTENDS.items():
        text = f"{_text(nodes, tokens)}, {new} new tokens each"
        yield Shape(name, text, _uniform(nodes, tokens, new), cpu)
    for prefix in (1024, 8192, 32768):
        for batch in (1, 8, 32):
            text = f"{batch} x {prefix} tokens, draft trees of 60"
            cpu = "quick" if (prefix, batch) == (1024, 1) else "no"
            make = _bound(_verify, prefix, batch, 60)
            yield Shape(f"T-{prefix}-{batch}", text, make, cpu)
    yield Shape("J", "fork 8, join, fork 8, segments of 2048", _bound(joined, 8, 2048), "no")
    yield Shape("J-s", "fork 4, join, fork 4, segments of 512", _bound(joined, 4, 512), "quick")
    for seed in (1, 2, 3):
        yield Shape(f"R{seed}", f"random tree {seed}, 200 leaves", _bound(ragged, seed), "no")
    yield Shape("R9", "random tree 9, 40 leaves", _bound(ragged, 9, 40), "quick")


def _bound(make: Callable[..., Forest], *args: int) -> Callable[[], Forest]:
    return cache(lambda: make(*args))


def _uniform(nodes: list[int], tokens: list[int], new: int = 1) -> Callable[[], Forest]:
    return cache(lambda: uniform(nodes, tokens, new))


SHAPES: dict[str, Shape] = {shape.id: shape for shape in _all()}
