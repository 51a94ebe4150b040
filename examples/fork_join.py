"""Two threads go on from one prompt, in one batch over shared pages; then one context holds both.

Runs anywhere: the model is tiny and random. With a real one, only `tiny_llama()` changes.
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
    hf.forward(model, {root: range(40)})  # the prompt, read once
    threads = root.fork(2)  # both see its pages: nothing is copied
    feed = dict(zip(threads, ([41, 42, 43], [44]), strict=True))  # their openings

    for _ in range(8):
        logits = hf.forward(model, feed)  # one pass for all threads
        feed = {thread: [int(row.argmax())] for thread, row in zip(feed, logits, strict=True)}
    print(cache.render())

    # The last token of each thread is not in the cache yet: `pending` feeds it before the join.
    hf.join(root, threads, pending={thread: ids[0] for thread, ids in feed.items()})
    logits = hf.forward(model, {root: [45]})  # sees the prompt and both threads
    print(f"after the join: {root.length} tokens in one context, next token {int(logits.argmax())}")
    assert root.length == 40 + (3 + 8) + (1 + 8) + 1


if __name__ == "__main__":
    main()
