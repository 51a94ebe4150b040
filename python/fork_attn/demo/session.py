"""A model with its forked cache and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fork_attn.hf as hf
from fork_attn import Branch, ForkedKVCache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Session:
    """An attached model, its cache and its tokenizer.

    Attributes:
        name: the model's name, for people.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache: ForkedKVCache

    def forward(self, tokens: Mapping[Branch, Sequence[int]]) -> torch.Tensor:
        """`fork_attn.hf.forward`: (n, vocab) logits after each branch's last token."""
        return hf.forward(self.model, tokens)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
