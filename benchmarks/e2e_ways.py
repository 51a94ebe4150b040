"""Ways to decode threads over one prefix with a Hugging Face model: this package, and what stock
transformers offers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from e2e_traces import Fork, Serial, Trace
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import fork_attn as fa
from fork_attn import hf

PREFILL_TOKENS = 512
FORCED = 7
"""The token that everybody decodes in a replay: the same for all, whatever the model says."""


class Way(ABC):
    """Decodes threads that all begin at the end of one prompt."""

    prefilled = 0  # tokens read again at joins since begin
    peak_bytes = 0  # of K and V since begin

    @abstractmethod
    def narrow(self, length: int) -> None:
        """Keeps the prompt's first `length` tokens alone, for good."""

    @abstractmethod
    def begin(self, threads: int) -> None:
        """Goes back to the prompt, and forks."""

    @abstractmethod
    def step(self, tokens: list[int]) -> Tensor:
        """Feeds one token to each thread; (threads, vocab) logits."""

    @abstractmethod
    def replay(self, trace: Trace) -> None:
        """Runs a trace, forced tokens and all, after `begin(1)`."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Of K and V that the threads hold, the prompt's among them."""

    def end(self) -> None:  # noqa: B027
        """Lets go of the threads."""

    def note(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.kv_bytes())


class Forked(Way):
    """fork_attn.hf: one ragged pass for all threads, joins without prefill."""

    def __init__(self, model: PreTrainedModel, prompt: list[int], num_pages: int) -> None:
        self.model = model
        self.cache = hf.attach(model, num_pages=num_pages)
        self.branches: list[fa.Branch] = []
        self.root = self._read(prompt)

    def _read(self, prompt: list[int]) -> fa.Branch:
        branch = self.cache.new_branch()
        for i in range(0, len(prompt), PREFILL_TOKENS):
            hf.forward(self.model, {branch: prompt[i : i + PREFILL_TOKENS]})
        return branch

    def begin_from(self, prompt: list[int], threads: int) -> None:
        """Reads a prompt of its own, and forks."""
        self.end()
        stem = self._read(prompt)
        self.branches = stem.fork(threads)
        self.cache.free([stem])

    def narrow(self, length: int) -> None:
        self.root.crop(length)

    def begin(self, threads: int) -> None:
        self.end()
        self.prefilled = self.peak_bytes = 0
        self.branches = self.root.fork(threads)

    def step(self, tokens: list[int]) -> Tensor:
        rows = {b: [token] for b, token in zip(self.branches, tokens, strict=True)}
        return hf.forward(self.model, rows)

    def replay(self, trace: Trace) -> None:
        (parent,) = self.branches
        for phase in trace.phases:
            if isinstance(phase, Serial):
                for _ in range(phase.tokens):
                    hf.forward(self.model, {parent: [FORCED]})
                continue
            children = parent.fork(len(phase.lengths))
            for at in range(max(phase.lengths)):
                going = zip(children, phase.lengths, strict=True)
                hf.forward(self.model, {c: [FORCED] for c, length in going if at < length})
            self.note()
            if phase.joins:
                parent.join(children)
            else:
                self.cache.free(children)
                hf.forward(self.model, {parent: [FORCED] * phase.returns})
        self.note()

    def kv_bytes(self) -> int:
        return self.cache.stats().kv_bytes

    def end(self) -> None:
        self.cache.free([b for b in self.branches if b.alive])
        self.branches = []


def held_kv(caches: list[DynamicCache]) -> list[Tensor]:
    """K and V of each of their layers that holds something."""
    layers = [x for cache in caches for x in cache.layers if isinstance(x, DynamicLayer)]
    return [kv for x in layers for kv in (x.keys, x.values) if kv is not None]


class Stock(Way):
    """A DynamicCache of the prompt, and copies of it."""

    def __init__(self, model: PreTrainedModel, prompt: DynamicCache) -> None:
        self.model, self.prompt = model, prompt
        self.caches: list[DynamicCache] = []

    @staticmethod
    def read(model: PreTrainedModel, prompt: list[int]) -> DynamicCache:
        """The prompt's cache, which threads copy."""
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for i in range(0, len(prompt), PREFILL_TOKENS):
                ids = torch.tensor([prompt[i : i + PREFILL_TOKENS]], device=model.device)
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _feed(self, cache: DynamicCache, rows: list[list[int]]) -> Tensor:
        ids = torch.tensor(rows, device=self.model.device)
        with torch.no_grad():
            output = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[:, -1]

    @abstractmethod
    def _fork(self, cache: DynamicCache, threads: int) -> list[DynamicCache]:
        """Caches of threads that begin at this one's end."""

    @abstractmethod
    def _decode(self, caches: list[DynamicCache], lengths: tuple[int, ...]) -> None:
        """Decodes that many forced tokens per thread."""

    def narrow(self, length: int) -> None:
        surplus = self.prompt.get_seq_length() - length
        if surplus > 0:
            self.prompt.crop(-surplus)
            for kv in held_kv([self.prompt]):  # a view of all would be copied with all
                kv.data = kv.data.clone()

    def begin(self, threads: int) -> None:
        self.prefilled = self.peak_bytes = 0
        self.caches = self._fork(self.prompt, threads)

    def replay(self, trace: Trace) -> None:
        (parent,) = self.caches
        for phase in trace.phases:
            if isinstance(phase, Serial):
                for _ in range(phase.tokens):
                    self._feed(parent, [[FORCED]])
                continue
            assert isinstance(phase, Fork)
            children = self._fork(parent, len(phase.lengths))
            self._decode(children, phase.lengths)
            self.caches = [parent, *children]
            self.note()
            self.caches = [parent]
            again = sum(phase.lengths) if phase.joins else phase.returns
            self._feed(parent, [[FORCED] * again])
            self.prefilled += again if phase.joins else 0
        self.note()

    def kv_bytes(self) -> int:
        return sum(kv.numel() * kv.element_size() for kv in held_kv(self.caches))

    def end(self) -> None:
        self.caches = []


class StockBatch(Stock):
    """A row of one batch for each thread, as in `generate`; rows that have ended stay."""

    def _fork(self, cache: DynamicCache, threads: int) -> list[DynamicCache]:
        batch = copy.copy(cache)
        batch.layers = [copy.copy(layer) for layer in cache.layers]
        batch.batch_repeat_interleave(threads)  # the one copy
        return [batch]

    def step(self, tokens: list[int]) -> Tensor:
        return self._feed(self.caches[0], [[token] for token in tokens])

    def _decode(self, caches: list[DynamicCache], lengths: tuple[int, ...]) -> None:
        for _ in range(max(lengths)):
            self._feed(caches[0], [[FORCED]] * len(lengths))


class StockCopies(Stock):
    """A deep copy for each thread, one thread after the other."""

    def _fork(self, cache: DynamicCache, threads: int) -> list[DynamicCache]:
        return [copy.deepcopy(cache) for _ in range(threads)]

    def step(self, tokens: list[int]) -> Tensor:
        pairs = zip(self.caches, tokens, strict=True)
        return torch.cat([self._feed(cache, [[token]]) for cache, token in pairs])

    def _decode(self, caches: list[DynamicCache], lengths: tuple[int, ...]) -> None:
        for cache, length in zip(caches, lengths, strict=True):
            for _ in range(length):
                self._feed(cache, [[FORCED]])
