"""Two threads see each other's words while they are written, as in Hogwild! (arXiv 2504.06261).

Runs anywhere: the model is tiny and random. With a real one, only `tiny_llama()` changes;
`fork_attn.reason` has the whole system as the protocol "hogwild".
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fork_attn import hf


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def write(model: LlamaForCausalLM, watching: bool, num_tokens: int = 12) -> list[list[int]]:
    """What two threads write after one prompt, greedily."""
    cache = hf.attach(model, num_pages=64)
    root = cache.new_branch()
    hf.forward(model, {root: range(40)})  # the prompt, read once
    left, right = root.fork(2)
    if watching:  # each sees the other's tokens of earlier steps, and of the same step
        left.watch(right)
        right.watch(left)
    texts: dict = {left: [41], right: [42]}
    for _ in range(num_tokens):
        logits = hf.forward(model, {thread: ids[-1:] for thread, ids in texts.items()})
        for ids, row in zip(texts.values(), logits, strict=True):
            ids.append(int(row.argmax()))
    print(f"watching: {watching}; each thread sees {left.length} tokens")
    return list(texts.values())


def main() -> None:
    alone = write(tiny_llama(), watching=False)
    together = write(tiny_llama(), watching=True)
    for name, texts in (("alone", alone), ("together", together)):
        print(name, *texts, sep="\n  ")
    assert alone != together


if __name__ == "__main__":
    main()
