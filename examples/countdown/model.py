"""A word-level tokenizer and a small Llama, both made from scratch."""

from __future__ import annotations

import torch
from task import LIMIT, OPERATORS
from tokenizers import Tokenizer, models, pre_tokenizers
from traces import ANSWER, EOS, HIT, MOST_PATHS, NONE, TAGS, TRY
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD = "<pad>"
SIZES = {
    "cpu": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
    "cuda": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the game."""
    numbers = [str(n) for n in range(LIMIT + 1)]
    words = [*numbers, *OPERATORS, "=", "make", TRY, ANSWER, NONE]
    words += [
        "out",
        "low",
        "high",
        HIT,
        "miss",
        *(f"{path}:" for path in range(1, MOST_PATHS + 1)),
    ]
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, *TAGS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, EOS, *TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(TAGS),
    )


def make_model(size: str, vocabulary: int, pad: int, eos: int, seed: int) -> LlamaForCausalLM:
    """A Llama in fp32 with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=pad, bos_token_id=None, eos_token_id=eos, **SIZES[size], **HEADS,
    )  # fmt: skip
    return LlamaForCausalLM(config)
