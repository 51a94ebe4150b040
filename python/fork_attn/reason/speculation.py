"""Speculative decoding inside threads: what may draft tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fork_attn import hf
from fork_attn.checks import integer
from fork_attn.errors import Unsupported
from fork_attn.hf import _link
from fork_attn.reason.draft_model import ModelDrafter
from fork_attn.reason.drafts import Drafter
from fork_attn.reason.lookup import LookupDrafter

if TYPE_CHECKING:
    from fork_attn.reason.protocol import Protocol


class Speculation(ABC):
    """How draft tokens come about; all threads' drafts are verified in one forward.

    A draft never changes what a thread says: each token is picked from the model's own
    distribution with the thread's own random number, and a draft token is kept where it is the one
    that was picked. For candidates that are fixed before the pick that is the lossless rule of
    speculative sampling (arXiv 2211.17192, 2302.01318) over several candidates (SpecInfer, arXiv
    2305.09781), and the outcome does not depend on the drafter (arXiv 2408.07978).
    """

    @abstractmethod
    def drafter(self, model: PreTrainedModel, protocol: Protocol, longest: int) -> Drafter:
        """A drafter for one call of `generate`.

        Args:
            model: that generates, attached.
            protocol: that it runs.
            longest: tokens of the longest prompt.

        Raises:
            ValueError, TypeError, Unsupported: it cannot draft for these; nothing was done.
        """

    def facts(self) -> dict[str, Any]:
        """What a trace says of it, as plain values."""
        return {"method": type(self).__name__}

    def _check_counts(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if field.type == "int":
                integer(field.name, getattr(self, field.name), low=1)


@dataclass(frozen=True)
class PromptLookup(Speculation):
    """Drafts what followed the last few tokens where they occurred before: in the thread's own
    context, or in what the prompt's other threads have written so far.

    Attributes:
        num_tokens: of a candidate at most.
        candidates: continuations that one tree holds at most.
        max_ngram, min_ngram: tokens that must agree; longer ones are tried first.
    """

    num_tokens: int = 8
    candidates: int = 2
    max_ngram: int = 3
    min_ngram: int = 2

    def __post_init__(self) -> None:
        self._check_counts()
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram: expected at most max_ngram={self.max_ngram}, got {self.min_ngram}"
            )

    def drafter(self, model: PreTrainedModel, protocol: Protocol, longest: int) -> Drafter:
        return LookupDrafter(self.num_tokens, self.candidates, self.max_ngram, self.min_ngram)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True)
class DraftModel(Speculation):
    """Drafts with a smaller model of the same vocabulary, on a forked KV cache of its own whose
    branches fork, join and roll back with the threads.

    Its chain is picked with the thread's own sampling options and next random numbers, its other
    candidates are its likeliest. A thread for which its cache has no page, or it no position, goes
    on without drafts; the thread's note says so.

    Attributes:
        model: attached here if it is not attached yet.
        num_tokens: depth of a tree at most.
        candidates: tokens at each depth, the chain's own included.
    """

    model: PreTrainedModel
    num_tokens: int = 4
    candidates: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise TypeError(f"model: expected a PreTrainedModel, got {type(self.model).__name__}")
        self._check_counts()

    def drafter(self, model: PreTrainedModel, protocol: Protocol, longest: int) -> Drafter:
        if self.model is model:
            raise ValueError("speculation: expected a draft model, got the model that generates")
        sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, self.model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"speculation: expected a draft model with the {sizes[0]} token ids of "
                f"{type(model).__name__}, got {type(self.model).__name__} with {sizes[1]}"
            )
        if not _link.is_attached(self.model):
            hf.attach(self.model)
        cache = _link.link_of(self.model).cache
        if protocol.needs_ropes:
            try:
                cache._require_ropes("join(rebase=True)")
            except Unsupported as error:
                raise Unsupported(
                    f"speculation: protocol {protocol.name!r} moves tokens to other positions; "
                    f"{error}"
                ) from None
        config = self.model.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None)
        room = cache.num_pages * cache.page_size
        room = room if most is None else min(room, most)
        if longest >= room:
            raise ValueError(
                f"speculation: expected prompts of fewer than the {room} tokens that the draft "
                f"model {type(self.model).__name__} has room for, got {longest}"
            )
        return ModelDrafter(self.model, cache, most, self.num_tokens, self.candidates)

    def facts(self) -> dict[str, Any]:
        counts = {"num_tokens": self.num_tokens, "candidates": self.candidates}
        return {**super().facts(), "model": type(self.model).__name__, **counts}
