"""A model with its forked cache, and a record of what each branch fed: which slots, which calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import fork_attn.hf as hf
from fork_attn import Branch, ForkedKVCache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Fed:
    """What a branch fed itself, after its fork."""

    token_ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    position: int = 0


@dataclass
class Session:
    """An attached model, its cache and its tokenizer.

    Attributes:
        name: the model's name, for people.
        calls: model calls so far.
        fed: per branch what was fed through `forward`, kept until the caller drops it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache: ForkedKVCache
    calls: int = 0
    fed: dict[Branch, Fed] = field(default_factory=dict)

    def forward(self, tokens: Mapping[Branch, Sequence[int]]) -> torch.Tensor:
        """`fork_attn.hf.forward`, recorded: (n, vocab) logits after each branch's last token."""
        starts = {branch: branch.position for branch in tokens}
        with self.cache.step({branch: len(ids) for branch, ids in tokens.items()}) as step:
            logits = hf.forward(self.model, tokens, step=step)
        self.calls += 1
        slots = step.slot_mapping.tolist()
        row = 0
        for branch, ids in tokens.items():
            fed = self.fed.setdefault(branch, Fed(position=starts[branch]))
            fed.token_ids += ids
            fed.slots += slots[row : row + len(ids)]
            fed.calls.append(self.calls)
            row += len(ids)
        return logits

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
