"""Best of n: sample several continuations of one prompt, keep the likeliest, drop the others.

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


def main(n: int = 8, num_tokens: int = 20) -> None:
    model = tiny_llama()
    cache = hf.attach(model, num_pages=64)

    root = cache.new_branch()
    prompt = hf.forward(model, {root: range(50)})
    tries = root.fork(n)
    logits = prompt.expand(n, -1)
    score = torch.zeros(n)
    for _ in range(num_tokens):
        log_probs = logits.log_softmax(dim=-1)
        tokens = torch.multinomial(log_probs.exp(), 1)
        score += log_probs.gather(1, tokens)[:, 0]
        logits = hf.forward(model, dict(zip(tries, tokens.tolist(), strict=True)))

    best = int(score.argmax())
    before = cache.stats().pages_live
    root.select(tries[best])  # root takes the winner's context, the losers' pages are free again
    after = cache.stats().pages_live
    print(f"log-probabilities: {', '.join(f'{x:.1f}' for x in score.tolist())}")
    print(f"kept number {best}: {root.length} tokens, pages {before} -> {after}")
    assert root.length == 50 + num_tokens and after < before


if __name__ == "__main__":
    main()
