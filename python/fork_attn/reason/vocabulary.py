"""A tokenizer as protocols use it: tags that are one token each, headers, text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fork_attn.reason.detokenize import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def missing_tags(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> list[str]:
    """The tags that are not one token of their own."""
    known = tokenizer.get_vocab()
    return [tag for tag in tags if tag not in known]


class Vocabulary:
    """Encodes headers and tags, each once.

    Attributes:
        tokenizer: the model's.
        pieces: the text of single tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pieces = Pieces(tokenizer)
        self._encoded: dict[str, list[int]] = {}
        self._stops: dict[tuple[str, ...], dict[int, str]] = {}

    def encode(self, text: str) -> list[int]:
        ids = self._encoded.get(text)
        if ids is None:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            self._encoded[text] = ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.pieces.join(list(token_ids))

    def tag(self, tag: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(tag))  # type: ignore[arg-type]

    def stops(self, tags: tuple[str, ...]) -> dict[int, str]:
        """Token id to tag."""
        found = self._stops.get(tags)
        if found is None:
            found = self._stops[tags] = {self.tag(tag): tag for tag in tags}
        return found
