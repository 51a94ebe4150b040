"""Models for measurements end to end: real weights on a CPU, random ones of real sizes on a GPU."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fork_attn.demo import weights

NAMES = ("smollm2", "tiny", "llama-3-8b", "qwen3-8b")


def load(name: str, device: torch.device) -> PreTrainedModel:
    """A model by name, in eval mode. Speed does not depend on weights: those of 8B are random.

    Raises:
        WeightsError: SmolLM2's package is missing.
    """
    if name == "smollm2":
        return _to(weights.load()[0], device)
    torch.manual_seed(0)
    if name == "tiny":
        config = LlamaConfig(
            vocab_size=199,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
        return _to(LlamaForCausalLM(config).eval(), device)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = _large(name)
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def _to(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    torch.nn.Module.to(model, device)  # transformers' own decorator hides the signature
    return model


def _large(name: str) -> PreTrainedModel:
    if name == "llama-3-8b":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128_256,
                hidden_size=4096,
                intermediate_size=14_336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=131_072,
            )
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=4096,
            intermediate_size=12_288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131_072,
        )
    )
