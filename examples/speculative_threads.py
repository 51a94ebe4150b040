"""Speculative decoding inside threads: the same words in fewer steps.

Four samples of one prompt draft tokens, once by prompt lookup and once with a small model; each
step of the large model verifies the drafts of all threads. Runs anywhere: the models are tiny and
random. With real ones, only `tiny_llama()` and `tokenizer()` change.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fork_attn import reason
from fork_attn.reason.systems import BestOfN

WORDS = ["<eos>", "the", "cat", "sat", "on", "mat", "and", "saw", "dog", "that"]


def tiny_llama(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=layers, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="that"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def main() -> None:
    model, small = tiny_llama(4, seed=0), tiny_llama(1, seed=0)
    sampling = GenerationConfig(do_sample=True, temperature=0.6, max_new_tokens=60)
    drafts = {
        "none": None,
        "prompt lookup": reason.PromptLookup(num_tokens=4),
        "small model": reason.DraftModel(small, num_tokens=3, candidates=2),
    }
    traces = {}
    for name, speculation in drafts.items():
        trace = traces[name] = reason.generate(
            model, tokenizer(), "the cat sat on the mat and the cat saw",
            protocol=BestOfN(n=4), sampling=sampling, speculation=speculation,
        )  # fmt: skip
        print(
            f"{name}: {len(trace.steps)} steps, {trace.steps_saved} saved, "
            f"{trace.acceptance_rate:.0%} of {trace.drafted_tokens} draft tokens accepted"
        )
    for trace in traces.values():  # drafts change the number of steps, and not one token
        assert [t.token_ids for t in trace.threads] == [t.token_ids for t in traces["none"].threads]
    assert len(traces["small model"].steps) < len(traces["none"].steps)


if __name__ == "__main__":
    main()
