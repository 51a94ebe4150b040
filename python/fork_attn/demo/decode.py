"""The decoding loop that fork-attn and the stock baselines share, with one rule of ending."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Forward = Callable[[Mapping[int, Sequence[int]]], torch.Tensor]
"""Feeds token ids to lanes; gives (n, vocab) logits after each lane's last token, in order."""

Finish = Literal["sentence", "line", "eos", "budget"]

_LINE_TOKENS = 4  # a line break before this many tokens only starts the text


@dataclass(frozen=True)
class Ending:
    """When a text ends: at the end token or a line's end, at a sentence's end from `min_tokens` on,
    at the latest at `max_tokens`.
    """

    tokenizer: PreTrainedTokenizerBase
    min_tokens: int
    max_tokens: int

    def finish(self, token_ids: Sequence[int]) -> Finish | None:
        """Why the text ends with these generated tokens, or None if it goes on."""
        if token_ids[-1] == self.tokenizer.eos_token_id:
            return "eos"
        piece = str(self.tokenizer.decode(token_ids[-1]))
        if "\n" in piece and len(token_ids) >= _LINE_TOKENS:
            return "line"
        if piece.rstrip().endswith((".", "!", "?")) and len(token_ids) >= self.min_tokens:
            return "sentence"
        return "budget" if len(token_ids) >= self.max_tokens else None


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked; a lane's picks do not depend on the lanes that run beside it.

    Attributes:
        temperature: 0 picks the most likely token.
        seed: of lane 0; lane i draws from `seed + i`.
    """

    temperature: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"temperature {self.temperature:g}, seed {self.seed}" if self.temperature else "greedy"
        )

    def generator(self, lane: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + lane)

    def pick(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token id for logits (vocab,)."""
        if not self.temperature:
            return int(logits.argmax())
        weights = torch.softmax(logits.float() / self.temperature, dim=-1)
        return int(torch.multinomial(weights, 1, generator=generator))


@dataclass
class Written:
    """What a lane generated, without an end token, and why it stopped."""

    token_ids: list[int] = field(default_factory=list)
    finish: Finish = "budget"

    @property
    def pending(self) -> list[int]:
        """The last token where it was picked but not fed yet: its K and V are not in the cache."""
        return [] if self.finish == "eos" else self.token_ids[-1:]


def decode(
    forward: Forward,
    given: Mapping[int, Sequence[int]],
    ending: Ending,
    sampling: Sampling,
) -> dict[int, Written]:
    """Lets lanes write together until each has ended; a lane that has ended leaves the batch.

    Args:
        forward: runs the model.
        given: per lane the tokens that it is given, at least one.
        ending: when a lane ends.
        sampling: how tokens are picked.

    Returns:
        What each lane wrote; the last token of each is not fed.
    """
    written = {lane: Written() for lane in given}
    generators = {lane: sampling.generator(lane) for lane in given}
    feed: dict[int, Sequence[int]] = dict(given)
    logits = forward(feed)
    while True:
        going: dict[int, Sequence[int]] = {}
        for lane, row in zip(feed, logits, strict=True):
            text = written[lane]
            text.token_ids.append(sampling.pick(row, generators[lane]))
            finish = ending.finish(text.token_ids)
            if finish is None:
                going[lane] = text.token_ids[-1:]
                continue
            text.finish = finish
            if finish == "eos":
                text.token_ids.pop()
        if not going:
            return written
        feed = going
        logits = forward(feed)
