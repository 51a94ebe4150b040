"""A small model over the cache, compiled whole, against itself uncompiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fork_attn as fa

DIM, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 16, 3


class Model(nn.Module):
    """Layers of attention through the cache; the step is given."""

    def __init__(self, cache: fa.ForkedKVCache) -> None:
        super().__init__()
        self.cache = cache
        self.qkv = nn.ModuleList(
            nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in range(LAYERS)
        )
        self.out = nn.ModuleList(nn.Linear(HEADS * HEAD_DIM, DIM) for _ in range(LAYERS))
        self.sinks = nn.Parameter(torch.randn(HEADS), requires_grad=False)

    def forward(self, x: Tensor, step: fa.Step) -> Tensor:
        for i in range(LAYERS):
            qkv = self.qkv[i](x).view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM)
            q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
            options = {"softcap": 20.0, "sinks": self.sinks} if i == 2 else {}
            x = x + self.out[i](self.cache.attend(i, q, k, v, step, **options).flatten(1))
        return x


def make_cache(device: str = "cpu", **options: Any) -> fa.ForkedKVCache:
    return fa.ForkedKVCache(
        num_layers=LAYERS,
        num_pages=100,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        sliding_window=[None, 6, None],
        page_size=4,
        dtype=torch.float32,
        device=device,
        **options,
    )


def compiled_steps_equal_plain_ones(
    compiler: str, device: str = "cpu", *, settles: bool = True, **options: Any
) -> None:
    """Prefill, forks, a join, wider and narrower steps, without graph breaks. `settles`: once the
    number of rows is known to change, there is no recompilation either. The Triton op takes
    sizes of the plan, of which 0 and 1 are compiled apart: a few steps only."""
    torch._dynamo.reset()
    cache = make_cache(device, **options)
    model = Model(cache).to(device).eval()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    root = cache.new_branch()
    recompiled = []

    def step(tokens: dict[fa.Branch, int]) -> None:
        counters.clear()
        x = torch.randn(sum(tokens.values()), DIM, device=device)
        with torch.no_grad(), cache.step(tokens) as step:
            for layer in range(LAYERS):
                step.plan_for(layer)
            for layer in range(LAYERS):  # what this step stores must come from the compiled pass
                for kv in cache.layer(layer):
                    at = step.slot_mapping
                    kv[at // cache.page_size, at % cache.page_size] = torch.nan
            got = compiled(x, step)
            want = model(x, step)
        assert bool(want.isfinite().all())
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        recompiled.append(counters["stats"]["unique_graphs"])

    step({root: 7})
    kids = root.fork(3)
    step(dict.fromkeys(kids, 1))
    if not settles:
        return
    for count in (2, 3):
        step(dict.fromkeys(kids, count))
    warm = len(recompiled)
    kids[0].join([kids.pop()])
    for _ in range(2):
        step(dict.fromkeys(kids, 1))
    kids += kids[1].fork(2)
    step(dict.fromkeys(kids, 4))
    assert sum(recompiled[:warm]) > 0, recompiled
    assert not any(recompiled[warm:]), recompiled
    cache.check()
