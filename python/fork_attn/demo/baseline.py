"""The same threads with stock transformers: each has a copy of the prompt's cache, none joins.

After the threads have ended, no context holds them all: stock transformers goes on from the
prompt's cache and reads all threads' tokens again, one thread after the other.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fork_attn.demo.decode import Sampling, Written, decode
from fork_attn.demo.threads import Round, Script

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights, for use beside one that fork-attn is attached to.

    Call it before attaching.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def read_prompt(model: PreTrainedModel, script: Script) -> DynamicCache:
    """The prompt's cache, which threads copy."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    _Single(model, cache)({0: script.prompt_ids})
    return cache


def one_by_one(
    model: PreTrainedModel,
    prompt: DynamicCache,
    script: Script,
    sampling: Sampling,
) -> Round:
    """A copy of the prompt's cache per thread, one thread decoded after the other."""
    began = time.perf_counter()
    caches = [copy.deepcopy(prompt) for _ in script.openings]
    forked = time.perf_counter()
    written = tuple(
        decode(_Single(model, cache), {lane: ids}, script.thread_ending, sampling)[lane]
        for lane, (cache, ids) in enumerate(zip(caches, script.opening_ids, strict=True))
    )
    decoded = time.perf_counter()
    kv_bytes = sum(map(_kv_bytes, caches))
    return _finish(model, prompt, script, written, began, forked, decoded, kv_bytes)


def in_one_batch(
    model: PreTrainedModel,
    prompt: DynamicCache,
    script: Script,
    sampling: Sampling,
) -> Round:
    """The prompt's cache copied into a row per thread, all rows decoded together.

    Rows that have ended stay in the batch, as in `generate`.
    """
    began = time.perf_counter()
    cache = copy.deepcopy(prompt)
    cache.batch_repeat_interleave(len(script.openings))
    forked = time.perf_counter()
    lanes = decode(
        _Batch(model, cache, len(script.openings)),
        dict(enumerate(script.opening_ids)),
        script.thread_ending,
        sampling,
    )
    decoded = time.perf_counter()
    written = tuple(lanes[lane] for lane in range(len(lanes)))
    return _finish(model, prompt, script, written, began, forked, decoded, _kv_bytes(cache))


def _finish(
    model: PreTrainedModel,
    prompt: DynamicCache,
    script: Script,
    written: tuple[Written, ...],
    began: float,
    forked: float,
    decoded: float,
    kv_bytes: int,
) -> Round:
    threads = [
        token
        for opening, text in zip(script.opening_ids, written, strict=True)
        for token in (*opening, *text.token_ids)
    ]
    resumed_from = time.perf_counter()
    _Single(model, copy.deepcopy(prompt))({0: [*threads, *script.closing_ids]})
    return Round(
        written=written,
        fork_seconds=forked - began,
        decode_seconds=decoded - forked,
        resume_seconds=time.perf_counter() - resumed_from,
        read_again=len(threads),
        kv_bytes=kv_bytes,
    )


class _Single:
    """One lane over a cache of its own."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache) -> None:
        self._model, self._cache = model, cache

    def __call__(self, tokens: Mapping[int, Sequence[int]]) -> torch.Tensor:
        (ids,) = tokens.values()
        with torch.no_grad():
            output = self._model(
                input_ids=torch.tensor([list(ids)]), past_key_values=self._cache, logits_to_keep=1
            )
        return output.logits[:, -1]


class _Batch:
    """One row per lane, padded on the left where a call feeds it fewer tokens than another."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, lanes: int) -> None:
        self._model, self._cache = model, cache
        self._mask = torch.ones(lanes, cache.get_seq_length(), dtype=torch.long)

    def __call__(self, tokens: Mapping[int, Sequence[int]]) -> torch.Tensor:
        lanes, width = len(self._mask), max(len(ids) for ids in tokens.values())
        ids = torch.zeros(lanes, width, dtype=torch.long)
        mask = torch.zeros(lanes, width, dtype=torch.long)
        for lane, row in tokens.items():
            ids[lane, width - len(row) :] = torch.tensor(row)
            mask[lane, width - len(row) :] = 1
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        with torch.no_grad():
            output = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                logits_to_keep=1,
            )
        return output.logits[list(tokens), -1]


def _kv_bytes(cache: DynamicCache) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values, *_ in cache)
