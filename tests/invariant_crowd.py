"""Branches at random in a batch-invariant cache, and each of their rows alone, for any backend."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

import fork_attn as fa
from fork_attn.plan_buffers import PlanBuffers
from fork_attn.reference import attention
from fork_attn.testing.tolerance import assert_close_to_oracle

NUM_ORDERS = 8


@dataclass(frozen=True)
class Setting:
    """What a backend is tried with."""

    backend: Any = "cpu"
    device: str = "cpu"
    groups: tuple[int, ...] = (1, 3, 4, 8)
    head_dims: tuple[int, ...] = (8, 24, 64)
    head_dims_v: tuple[int, ...] = (8, 40, 64)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    windows: tuple[int | None, ...] = (None, None, 1, 70, 300)
    page_sizes: tuple[int, ...] = (1, 5, 16, 64)
    workers: tuple[int, ...] = (1, 2, 7, 40)
    counts: tuple[int, ...] = (1, 1, 1, 2, 30, 100, 500)  # new tokens of a branch in a step
    last_counts: tuple[int, ...] = (1, 1, 1, 2, 30, 100, 500)  # in the step that is compared
    num_pages: int = 20000


@dataclass
class Token:
    """What is stored of one token, and where it stands."""

    position: int
    k: torch.Tensor
    v: torch.Tensor


@dataclass
class Row:
    """One query of a step: its query, itself and what it sees, and its result."""

    q: torch.Tensor
    context: list[Token]
    out: torch.Tensor
    lse: torch.Tensor


def make_cache(
    rng: random.Random, setting: Setting, like: fa.ForkedKVCache | None = None
) -> fa.ForkedKVCache:
    """A batch-invariant cache of one layer; pages, tails and workers at random."""
    if like is None:
        heads, group = rng.choice([1, 2]), rng.choice(setting.groups)
        shape = {
            "num_q_heads": heads * group,
            "num_kv_heads": heads,
            "head_dim": rng.choice(setting.head_dims),
            "head_dim_v": rng.choice(setting.head_dims_v),
            "sliding_window": rng.choice(setting.windows),
            "dtype": rng.choice(setting.dtypes),
        }
    else:
        layer = like._layer(0)
        shape = {
            "num_q_heads": layer.num_q_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "head_dim_v": layer.head_dim_v,
            "sliding_window": layer.window,
            "dtype": like.dtype,
        }
    return fa.ForkedKVCache(
        num_layers=1,
        num_pages=setting.num_pages,
        page_size=rng.choice(setting.page_sizes),
        tail=rng.choice(["seal", "copy"]),
        num_workers=rng.choice(setting.workers),
        batch_invariant=True,
        backend=setting.backend,
        device=setting.device,
        **shape,
    )


def random_tokens(cache: fa.ForkedKVCache, positions: list[int]) -> list[Token]:
    layer = cache._layer(0)
    return [
        Token(
            at,
            torch.randn(layer.num_kv_heads, layer.head_dim).to(cache.dtype),
            torch.randn(layer.num_kv_heads, layer.head_dim_v).to(cache.dtype),
        )
        for at in positions
    ]


def store(cache: fa.ForkedKVCache, step: fa.Step, tokens: list[Token]) -> None:
    k, v = (torch.stack([getattr(t, name) for t in tokens]).to(cache.device) for name in "kv")
    torch.ops.fork_attn.store_kv(k, v, *cache.layer(0), step.slot_mapping)


def run(
    cache: fa.ForkedKVCache,
    step: fa.Step,
    q: torch.Tensor,
    tokens: list[Token],
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stores the step's tokens and attends: (out, lse) on the CPU."""
    store(cache, step, tokens)
    sinks = options.get("sinks")
    options = options | {"sinks": None if sinks is None else sinks.to(cache.device)}
    out, lse = fa.tree_attention(
        q.to(cache.device), *cache.layer(0), step.plan, backend=cache.backend, **options
    )
    return out.cpu(), lse.cpu()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@dataclass
class Crowd:
    """Branches that fork, join, crop, excise and grow at random, with all their tokens."""

    rng: random.Random
    setting: Setting = Setting()
    cache: fa.ForkedKVCache = field(init=False)
    contexts: dict[fa.Branch, list[Token]] = field(init=False)
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = make_cache(self.rng, self.setting)
        self.contexts = {self.cache.new_branch(): []}
        heads = self.cache._layer(0).num_q_heads
        self.options = {"softcap": self.rng.choice([None, 5.0])}
        if self.rng.random() < 0.5:
            self.options["sinks"] = torch.randn(heads)

    def act(self) -> None:
        rng = self.rng
        branch = rng.choice(list(self.contexts))
        context = self.contexts[branch]
        verb = rng.choice(["step"] * 4 + ["fork"] * 3 + ["fork_at", "join", "crop", "excise", "at"])
        if verb == "step":
            self.step(attend=False)
        elif verb == "fork" and len(self.contexts) < 12:
            for child in branch.fork(rng.choice([1, 2, 5])):
                self.contexts[child] = list(context)
        elif verb == "fork_at":
            length = rng.randint(0, branch.length)
            self.contexts[branch.fork_at(length)] = context[:length]
        elif verb == "join":
            self.join(branch)
        elif verb == "crop":
            length = rng.randint(branch.length * 3 // 4, branch.length)
            branch.crop(length)
            del context[length:]
        elif verb == "excise":
            start = rng.randint(0, branch.length)
            end = rng.randint(start, min(start + 90, branch.length))
            branch.excise(start, end)
            del context[start:end]
        elif verb == "at":
            branch.position = branch.position + rng.randint(0, 9)

    def join(self, branch: fa.Branch) -> None:
        children = [b for b in self.contexts if b is not branch and self.rng.random() < 0.3]
        if not children:
            return
        context = self.contexts[branch]
        held = {id(token) for token in context}
        for child in children:
            for token in self.contexts.pop(child):
                if id(token) not in held:
                    held.add(id(token))
                    context.append(token)
        branch.join(children)

    def step(self, attend: bool = True) -> list[Row]:
        """One step of some branches: prompts, single tokens, drafts."""
        rng = self.rng
        chosen = [b for b in self.contexts if rng.random() < 0.8] or list(self.contexts)[:1]
        entries: dict[fa.Branch, int | fa.Draft] = {}
        for branch in chosen:
            count = rng.choice(self.setting.last_counts if attend else self.setting.counts)
            draft = count < 100 and rng.random() < 0.3
            entries[branch] = (
                fa.Draft([rng.randint(max(-1, i - 3), i - 1) for i in range(count)])
                if draft
                else count
            )
        layer = self.cache._layer(0)
        rows = []
        with self.cache.step(entries) as step:
            q = torch.randn(step.num_tokens, layer.num_q_heads, layer.head_dim)
            q = q.to(self.cache.dtype)
            tokens = random_tokens(self.cache, step.position_ids.tolist())
            out = lse = torch.empty(0)
            if attend:
                out, lse = run(self.cache, step, q, tokens, self.options)
            else:
                store(self.cache, step, tokens)
            for i, (branch, entry) in enumerate(entries.items()):
                first, end = step.cu_seqlens_q[i : i + 2].tolist()
                parents = entry.parents if isinstance(entry, fa.Draft) else range(-1, end - 1)
                paths: list[list[int]] = []
                for j in range(end - first):
                    paths.append([*(paths[parents[j]] if parents[j] >= 0 else []), j])
                    if attend:
                        seen = self.contexts[branch] + [tokens[first + p] for p in paths[j]]
                        rows.append(Row(q[first + j], seen, out[first + j], lse[first + j]))
                kept = rng.choice(paths)
                if isinstance(entry, fa.Draft):
                    step.accept(kept, branch)
                else:
                    kept = paths[-1]
                self.contexts[branch] += [tokens[first + p] for p in kept]
        return rows


def scores_in_orders(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(N, q heads, orders): q (q heads, dim) times k (N, KV heads, dim), one column after another,
    in several orders."""
    products = (q * k.repeat_interleave(len(q) // k.shape[1], 1)).movedim(-1, 0).contiguous()
    draw = torch.Generator().manual_seed(0)  # The same orders for every row and every run.
    scores = torch.zeros(NUM_ORDERS, *products.shape[1:])
    for order in scores:
        for column in torch.randperm(len(products), generator=draw):
            order += products[column]
    return scores.movedim(0, -1)


def check_against_oracle(crowd: Crowd, rows: list[Row]) -> None:
    """All rows at once: the worst error of a single row's few values says little about the rule.

    What the precision reaches depends on the order in which scores are summed, one column after
    another as in tiles: where one row has the worst error, by luck. So it is the worst of several
    orders.
    """
    layer = crowd.cache._layer(0)
    options = {"softmax_scale": layer.head_dim**-0.5, **crowd.options}
    exact, same = [], []
    for row in rows:
        k, v = (torch.stack([getattr(t, name) for t in row.context]) for name in "kv")
        at = torch.tensor([t.position for t in row.context])
        seen = (at[-1] - at < (layer.window or 2**40))[None]
        exact.append(attention(row.q[None], k, v, seen, dtype=torch.float64, **options))
        # A query row for each order, which picks the order's scores out of the keys.
        scores, heads = scores_in_orders(row.q.float(), k.float()), len(row.q)
        picks = torch.eye(NUM_ORDERS)[:, None].expand(-1, heads, -1)
        values, seen = v.repeat_interleave(heads // v.shape[1], 1), seen.expand(NUM_ORDERS, -1)
        same.append(attention(picks, scores, values, seen, dtype=torch.float32, **options))
    for part, name in enumerate(("out", "lse")):
        got = torch.stack([getattr(row, name) for row in rows])
        oracle = torch.cat([one[part] for one in exact])
        references = torch.stack([one[part] for one in same], 1).to(got.dtype)
        worst = max(references, key=lambda x: float((x - oracle).abs().max()))
        assert_close_to_oracle(got, oracle, worst, name=name, magnitude=1.0)


def alone(crowd: Crowd, row: Row, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row's result in a cache of its own, its last `new` tokens in one step."""
    cache = make_cache(crowd.rng, crowd.setting, like=crowd.cache)
    layer = cache._layer(0)
    branch = cache.new_branch()
    at = 0
    out = lse = torch.empty(0)
    split = len(row.context) - new
    while at < len(row.context):  # tokens of consecutive positions go in one step
        end = at + 1
        while (
            end < len(row.context)
            and end != split
            and row.context[end].position == row.context[end - 1].position + 1
        ):
            end += 1
        branch.position = row.context[at].position
        with cache.step({branch: end - at}) as step:
            if end < len(row.context):
                store(cache, step, row.context[at:end])
            else:
                q = torch.randn(end - at, layer.num_q_heads, layer.head_dim).to(cache.dtype)
                q[-1] = row.q
                out, lse = run(cache, step, q, row.context[at:end], crowd.options)
        at = end
    return out[-1], lse[-1]


def check_buffers(crowd: Crowd) -> None:
    """A step of one token a branch gives the same bits through fixed buffers, padded."""
    cache, layer = crowd.cache, crowd.cache._layer(0)
    branches = list(crowd.contexts)
    width = len(branches) + 3
    buffers = PlanBuffers(cache, max_tokens=width, max_plan_bytes=2**20, max_partial_rows=2000)
    with cache.step(dict.fromkeys(branches, 1)) as step:
        q = torch.randn(len(branches), layer.num_q_heads, layer.head_dim).to(cache.dtype)
        tokens = random_tokens(cache, step.position_ids.tolist())
        out, _ = run(cache, step, q, tokens, crowd.options)
        buffers.update(step)
        k, v = (torch.stack([getattr(t, name) for t in tokens]) for name in "kv")
        padded = [
            torch.cat([x, x.new_full((3, *x.shape[1:]), torch.nan)]).to(cache.device)
            for x in (q, k, v)
        ]
        sinks = crowd.options.get("sinks")
        options = crowd.options | {"sinks": None if sinks is None else sinks.to(cache.device)}
        through = buffers.attend(0, *padded, **options)
    assert same_bits(through[: len(branches)].cpu(), out)
    assert (through[len(branches) :] == 0).all()
    for branch, token in zip(branches, tokens, strict=True):
        crowd.contexts[branch].append(token)
