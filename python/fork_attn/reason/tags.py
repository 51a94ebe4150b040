"""Adding a protocol's tags to a tokenizer and its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fork_attn.reason.protocol import Protocol, get_protocol
from fork_attn.reason.vocabulary import missing_tags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_tags(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: str | Protocol
) -> list[str]:
    """Makes a protocol's tags single tokens, with new embeddings where the model has none for them.

    Call it before the model is attached, and train the model on the tags afterwards.

    Returns:
        The tags that were added.
    """
    missing = missing_tags(tokenizer, get_protocol(protocol).tags())
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        embeddings = torch.as_tensor(model.get_input_embeddings().weight)
        if len(tokenizer) > embeddings.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    return missing
