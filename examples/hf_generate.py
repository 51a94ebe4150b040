"""Plain `model.generate` over a forked cache: same tokens as with stock transformers, shared pages.

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
    prompt = torch.arange(3, 43)[None]
    options = {"max_new_tokens": 12, "num_beams": 4, "pad_token_id": 0, "eos_token_id": None}

    stock = model.generate(prompt, **options)  # an attached model works as before
    forked = hf.ForkCache(cache)
    ours = model.generate(prompt, past_key_values=forked, **options)
    assert torch.equal(ours, stock)
    print(f"4 beams, the same tokens as stock: {ours[0, prompt.shape[1] :].tolist()}")

    pages = cache.stats().pages_live
    print(f"4 beams of {ours.shape[1]} tokens share {pages} pages; 4 copies would take 16")
    forked.free()
    assert cache.stats().pages_live == 0


if __name__ == "__main__":
    main()
