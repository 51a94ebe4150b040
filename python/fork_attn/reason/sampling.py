"""Picking tokens for many threads at once; a thread's picks do not depend on who runs beside it."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fork_attn.errors import Unsupported

if TYPE_CHECKING:
    from fork_attn.reason.thread import Thread

# What would change the tokens and is not done here, by name, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "guidance_scale": (None, 1, 1.0),
    "sequence_bias": (None,),
    "bad_words_ids": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "top_h": (None,),
    "token_healing": (None, False),
    "diversity_penalty": (None, 0.0),
}


def check_config(config: GenerationConfig) -> None:
    """Raises Unsupported, by name, for what the sampler would have to ignore."""
    for name, neutral in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise Unsupported(f"sampling: {name}={value!r} is not part of fork_attn.reason")


def thread_seed(seed: int, path: Sequence[tuple[int, int]]) -> int:
    """The seed of a thread: of its place in the tree alone.

    Args:
        seed: of the prompt.
        path: for each fork above, which fork of its parent, and which child.
    """
    digest = hashlib.blake2b(f"{seed}/{list(path)}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


class Sampler:
    """One way of picking tokens, for any number of threads.

    Temperature, top-k, top-p, min-p, typical, epsilon and eta cutoffs, suppressed tokens,
    repetition penalty and n-gram bans are transformers' own processors.

    Args:
        config: do_sample, temperature and so on; what is None is not done.
        processors: instead of those that the config asks for; each is called for one thread at a
            time, with the tokens that it sees.
    """

    def __init__(
        self, config: GenerationConfig, processors: Sequence[LogitsProcessor] | None = None
    ) -> None:
        check_config(config)
        self.config = config
        self.greedy = not config.do_sample
        self._context = _context_processors(config) if processors is None else list(processors)
        own = processors is not None or self.greedy
        self._warpers = LogitsProcessorList([] if own else _warpers(config))
        if config.suppress_tokens and processors is None:
            self._warpers.insert(0, SuppressTokensLogitsProcessor(config.suppress_tokens))

    def changed(self, **options: Any) -> Sampler:
        """A sampler with other options."""
        config = copy.deepcopy(self.config)
        config.update(**options)
        return Sampler(config)

    def pick(
        self, logits: torch.Tensor, threads: Sequence[Thread]
    ) -> tuple[list[int], list[float]]:
        """A token for each thread, and its log-probability.

        Args:
            logits: (n, vocab).
            threads: n threads, whose contexts and random numbers are used.

        Returns:
            n token ids; n log-probabilities under the distribution that they were picked from.
        """
        scores = self.scores(logits, threads)
        if self.greedy:
            ids = scores.argmax(-1, keepdim=True)
        else:
            # Inverse transform: one uniform number a row, from the row's own generator.
            mass = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
            uniform = [(thread.rng.getrandbits(32) + 0.5) / 2.0**32 for thread in threads]
            drawn = torch.tensor(uniform, dtype=torch.float64, device=mass.device)[:, None]
            ids = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)
        logprobs = scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True)
        return ids.flatten().tolist(), logprobs.flatten().tolist()

    def scores(self, logits: torch.Tensor, threads: Sequence[Thread]) -> torch.Tensor:
        """What `pick` picks from: logits (n, vocab), processed, in float32."""
        scores = logits.float()
        if self._context:
            scores = torch.cat(
                [self._with_context(scores[i : i + 1], t) for i, t in enumerate(threads)]
            )
        if self._warpers:
            no_ids = torch.empty((len(threads), 0), dtype=torch.int64)
            scores = self._warpers(no_ids, scores)  # type: ignore[arg-type]
        return scores

    def _with_context(self, row: torch.Tensor, thread: Thread) -> torch.Tensor:
        """One row of scores, changed by what its thread has seen so far."""
        seen = torch.tensor([thread.context_ids()], device=row.device)
        for processor in self._context:
            row = processor(seen, row)
        return row


def pick_all(threads: Sequence[Thread], logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """A token for each thread, and its log-probability; those with the same sampler together.

    Args:
        threads: n threads.
        logits: (n, vocab).
    """
    first = threads[0].sampler
    if all(thread.sampler is first for thread in threads):
        return first.pick(logits, threads)
    ids, logprobs = [0] * len(threads), [0.0] * len(threads)
    for sampler in dict.fromkeys(thread.sampler for thread in threads):
        rows = [i for i, thread in enumerate(threads) if thread.sampler is sampler]
        picked = sampler.pick(logits[rows], [threads[i] for i in rows])
        for i, token, logprob in zip(rows, *picked, strict=True):
            ids[i], logprobs[i] = token, logprob
    return ids, logprobs


def likeliest(threads: Sequence[Thread], logits: torch.Tensor, count: int) -> list[list[int]]:
    """For each thread at most `count` tokens that it may pick, the likeliest first.

    Args:
        threads: n threads.
        logits: (n, vocab).
    """
    found: list[list[int]] = [[] for _ in threads]
    for sampler in dict.fromkeys(thread.sampler for thread in threads):
        rows = [i for i, thread in enumerate(threads) if thread.sampler is sampler]
        scores = sampler.scores(logits[rows], [threads[i] for i in rows])
        top = scores.topk(min(count, scores.shape[-1]), dim=-1)
        for i, values, ids in zip(rows, top.values.tolist(), top.indices.tolist(), strict=True):
            found[i] = [
                token for token, value in zip(ids, values, strict=True) if value > -math.inf
            ]
    return found


def _context_processors(config: GenerationConfig) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(penalty=config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return found


def _warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """In the order of transformers' own generate."""
    found: list[LogitsProcessor] = []
    if config.temperature is not None and config.temperature != 1.0:
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(TopKLogitsWarper(top_k=config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        found.append(TopPLogitsWarper(top_p=config.top_p))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(min_p=config.min_p))
    if config.typical_p is not None and config.typical_p < 1.0:
        found.append(TypicalLogitsWarper(mass=config.typical_p))
    if config.epsilon_cutoff is not None and 0.0 < config.epsilon_cutoff < 1.0:
        found.append(EpsilonLogitsWarper(epsilon=config.epsilon_cutoff))
    if config.eta_cutoff is not None and 0.0 < config.eta_cutoff < 1.0:
        found.append(EtaLogitsWarper(epsilon=config.eta_cutoff))
    return found
