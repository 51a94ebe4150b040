"""Tree search: each kept thought forks into several, the best of all are kept, the others freed.

Runs anywhere: the model is tiny and random, and the score is the mean log-probability. With a real
one, only `tiny_llama()` and `score` change (arXiv 2305.10601).
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fork_attn import hf


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def main(width: int = 3, fanout: int = 4, depth: int = 3, num_tokens: int = 6) -> None:
    model = tiny_llama()
    cache = hf.attach(model, num_pages=128)

    root = cache.new_branch()
    first = hf.forward(model, {root: range(40)})[0]
    kept = [(root, first, 0.0)]  # a thought: its branch, the logits after it, its log-probability
    for level in range(depth):
        children = [
            (child, logits, score)
            for branch, logits, score in kept
            for child in branch.fork(fanout)  # shares all pages of its parent
        ]
        branches = [branch for branch, _, _ in children]
        logits = torch.stack([row for _, row, _ in children])
        scores = torch.tensor([score for _, _, score in children])
        for _ in range(num_tokens):  # all thoughts of a level in one batch
            log_probs = logits.log_softmax(dim=-1)
            tokens = torch.multinomial(log_probs.exp(), 1)
            scores += log_probs.gather(1, tokens)[:, 0]
            logits = hf.forward(model, dict(zip(branches, tokens.tolist(), strict=True)))

        best = scores.topk(width).indices.tolist()
        losers = [branch for i, branch in enumerate(branches) if i not in best]
        parents = [branch for branch, _, _ in kept if branch is not root]
        cache.free([*losers, *parents])  # what the kept ones see lives on
        kept = [(branches[i], logits[i], scores[i].item()) for i in best]
        pages = cache.stats().pages_live
        print(f"level {level + 1}: {len(branches)} thoughts, {width} kept, {pages} pages in use")

    root.select(kept[0][0])  # the winner; all others are freed
    print(f"best: {root.length} tokens, log-probability {kept[0][2]:.1f}")
    assert root.length == 40 + depth * num_tokens and cache.stats().branches == 1


if __name__ == "__main__":
    main()
