"""What e4m3 KV costs in accuracy, against bf16: attention over random tensors, and the logits of
SmolLM2-135M-Instruct.

    python benchmarks/fp8_error.py [--json benchmarks/results/fp8_error.json]

Errors are against float64 attention over the same random tensors, and against the model over an
fp32 cache. Only accuracy is measured, no time; the figures depend neither on the machine nor on its
load.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import fork_attn as fa
from fork_attn import hf
from fork_attn.bench import results
from fork_attn.demo import weights
from fork_attn.demo.baseline import plain_copy
from fork_attn.reference import attention

CACHES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
HEADS, KV_HEADS, DIM = 8, 2, 64
FIRST_TOKENS = 32  # what calibrates the model's scales; the rest of the text follows in pieces
PIECE = 128


def random_rows(tokens: int, outliers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normal Q, K and V; with outliers, some channels of K are 20 times as large, as models
    have."""
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    if outliers:
        k[..., ::16] *= 20
        q[..., ::16] /= 20
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def attention_error(tokens: int, outliers: bool, cached: torch.dtype) -> float:
    """Error of a decode row's output over `tokens` keys, RMS over RMS."""
    q, k, v = random_rows(tokens, outliers)
    cache = fa.ForkedKVCache(
        num_layers=1,
        num_pages=tokens,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=cached,
    )
    with cache.step({cache.new_branch(): tokens}) as step:
        out = cache.attend(0, q, k, v, step).double()
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    exact, _ = attention(q, k, v, mask)
    half = tokens // 2  # rows that see many keys
    return float((out - exact)[half:].square().mean().sqrt() / exact[half:].square().mean().sqrt())


def logits_of(model: PreTrainedModel, ids: list[int], cached: torch.dtype) -> Tensor:
    """(len(ids), vocab): the text read in pieces over a cache of a dtype."""
    copy = plain_copy(model)
    cache = hf.attach(copy, num_pages=len(ids) // 16 + 2, dtype=cached)
    root = cache.new_branch()
    rows = [hf.forward(copy, {root: ids[:FIRST_TOKENS]}, logits="all")]
    for at in range(FIRST_TOKENS, len(ids), PIECE):
        rows.append(hf.forward(copy, {root: ids[at : at + PIECE]}, logits="all"))
    return torch.cat(rows).float()


def compare(logits: Tensor, exact: Tensor, ids: list[int]) -> dict[str, float]:
    """Differences of next-token distributions, over all tokens but the calibrating ones."""
    logits, exact = logits[FIRST_TOKENS:-1], exact[FIRST_TOKENS:-1]
    log_p, log_q = exact.log_softmax(-1), logits.log_softmax(-1)
    target = torch.tensor(ids[FIRST_TOKENS + 1 :])[:, None]
    centred = exact - exact.mean(-1, keepdim=True)
    return {
        "relative_logit_error": float(
            (logits - exact).square().mean().sqrt() / centred.square().mean().sqrt()
        ),
        "kl_divergence": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "same_top_token": float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()),
        "perplexity": math.exp(-float(log_q.gather(1, target).mean())),
        "perplexity_fp32": math.exp(-float(log_p.gather(1, target).mean())),
    }


def text() -> str:
    """English that does not change: the licence's text."""
    return (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


def measure(num_tokens: int) -> dict[str, Any]:
    result: dict[str, Any] = {"torch": torch.__version__, "random": [], "model": []}
    for outliers in (False, True):
        for tokens in (64, 512, 2048):
            row: dict[str, Any] = {"tokens": tokens, "outliers": outliers}
            row |= {
                name: attention_error(tokens, outliers, dtype) for name, dtype in CACHES.items()
            }
            result["random"].append(row)
            print(row)
    model, tokenizer = weights.load()
    ids = tokenizer(text())["input_ids"][:num_tokens]
    with torch.no_grad():
        exact = logits_of(model, ids, torch.float32)
        for name, dtype in CACHES.items():
            row = {"cache": name, "tokens": len(ids)}
            row |= compare(logits_of(model, ids, dtype), exact, ids)
            result["model"].append(row)
            print(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    args = parser.parse_args()
    result = measure(args.tokens)
    results.write(args.json, result)


if __name__ == "__main__":
    main()
