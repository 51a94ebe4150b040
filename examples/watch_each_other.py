"""Two workers on one problem, each of which reads what the other writes while it writes it.

As in Hogwild! Inference (arXiv 2504.06261): in a worker's view the other's work stands before its
own. No key is copied or turned for that. Runs anywhere: the model is tiny and random.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fork_attn import hf


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def main() -> None:
    model = tiny_llama()
    cache = hf.attach(model, num_pages=64)

    root = cache.new_branch()
    hf.forward(model, {root: range(40)})  # the problem, read once
    alice, bob = root.fork(2)
    alice.watch(bob)
    bob.watch(alice)

    feed = {alice: [41, 42], bob: [43, 44]}  # their openings
    for _ in range(8):
        logits = hf.forward(model, feed)  # row i of one sees rows 0 to i of the other
        feed = {worker: [int(row.argmax())] for worker, row in zip(feed, logits, strict=True)}
    print(cache.render())

    # Afterwards: one context with both texts, one after the other in position.
    hf.join(root, [alice, bob], pending={w: ids[0] for w, ids in feed.items()}, rebase=True)
    assert root.positions.tolist() == list(range(40 + 2 * (2 + 8)))
    logits = hf.forward(model, {root: [45]})
    print(f"after the join: {root.length} tokens in one context, next token {int(logits.argmax())}")


if __name__ == "__main__":
    main()
