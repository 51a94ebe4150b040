"""Job: the checked arguments of one call of `generate`, and the call's events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel

from fork_attn import hf
from fork_attn.errors import ForeignBranch, Unsupported
from fork_attn.hf import _link
from fork_attn.reason.build_trace import build_trace
from fork_attn.reason.detokenize import Detokenizer
from fork_attn.reason.drafts import Drafter
from fork_attn.reason.engine import Engine
from fork_attn.reason.kv_bias import KVBias
from fork_attn.reason.limits import Limits
from fork_attn.reason.protocol import Protocol, get_protocol
from fork_attn.reason.run import Run
from fork_attn.reason.sampling import Sampler
from fork_attn.reason.speculation import Speculation
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import Event
from fork_attn.reason.vocabulary import Vocabulary, missing_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fork_attn import ForkedKVCache


@dataclass(frozen=True)
class TokenEvent:
    """A thread has sampled a token.

    Attributes:
        prompt: index of the prompt.
        thread: index in `Trace.threads`; label: its name.
        token_id, logprob: the token.
        text: what it adds to the thread's text; empty while a character is not whole.
    """

    prompt: int
    thread: int
    label: str
    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True)
class ThreadEvent:
    """Threads were forked, joined and so on; `event.step` counts all steps of the call."""

    prompt: int
    event: Event


@dataclass(frozen=True)
class Finished:
    """A prompt is done."""

    prompt: int
    trace: Trace


StreamEvent = TokenEvent | ThreadEvent | Finished


class Job:
    """A checked call of `generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | list[str],
        protocol: str | Protocol,
        cache: ForkedKVCache | None,
        sampling: GenerationConfig | None,
        limits: Limits | None,
        seed: int,
        *,
        speculation: Speculation | None = None,
        prompt_ids: list[list[int]] | None = None,
        processors: Sequence[Any] | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.protocol = get_protocol(protocol)
        self.prompts = _check_prompts(prompt)
        _check_tokenizer(tokenizer, self.protocol)
        config = _config(sampling, model)
        self.limits = _limits(limits, config)
        self.prompt_ids = prompt_ids or [
            self.protocol.prompt_ids(tokenizer, text) for text in self.prompts
        ]
        self.max_positions = getattr(
            model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        self.samplers = [Sampler(config, processors)] * len(self.prompts)
        self.end_tokens = _end_tokens(config, model, tokenizer)
        stop_texts = config.stop_strings or ()
        self.stop_texts = (stop_texts,) if isinstance(stop_texts, str) else tuple(stop_texts)
        self.bias = self._bias()
        self.cache = _cache_of(model, cache)
        self._check_room()
        if self.protocol.needs_ropes:
            self._require_ropes()
        self.speculation = speculation
        self.drafter = None if speculation is None else self._drafter(speculation)

    def _bias(self) -> KVBias | None:
        vectors = getattr(self.protocol, "vectors", None)
        return None if vectors is None else KVBias(self.model, vectors)

    def _require_ropes(self) -> None:
        try:
            self.cache._require_ropes("join(rebase=True), watch")
        except Unsupported as error:
            raise Unsupported(
                f"protocol: {self.protocol.name!r} reads tokens at other positions than those they "
                f"were written at; {error}"
            ) from None

    def _drafter(self, speculation: Speculation) -> Drafter:
        if not isinstance(speculation, Speculation):
            raise TypeError(
                f"speculation: expected PromptLookup, DraftModel or another Speculation, got "
                f"{type(speculation).__name__}"
            )
        if self.protocol.watches:
            raise Unsupported(
                f"speculation: the threads of protocol {self.protocol.name!r} see each other's "
                "tokens while they are written, one step at a time; expected None"
            )
        if self.cache.backend == "flash_attn":
            raise Unsupported("speculation: backend 'flash_attn' has no draft trees; expected None")
        longest = max(map(len, self.prompt_ids))
        return speculation.drafter(self.model, self.protocol, longest)

    def _check_room(self) -> None:
        slots = self.cache.num_pages * self.cache.page_size
        for i, ids in enumerate(self.prompt_ids):
            where = f"prompt[{i}]" if len(self.prompt_ids) > 1 else "prompt"
            if not ids:
                raise ValueError(f"{where}: expected at least one token, got none")
            if self.max_positions is not None and len(ids) >= self.max_positions:
                raise ValueError(
                    f"{where}: expected fewer than the {self.max_positions} tokens that the model "
                    f"has positions for, got {len(ids)}"
                )
            if len(ids) >= slots:
                raise ValueError(
                    f"{where}: expected fewer than the {slots} tokens that the cache's "
                    f"{self.cache.num_pages} pages hold, got {len(ids)}"
                )
            most = self.limits.max_pages
            if most is not None and len(ids) > most * self.cache.page_size:
                raise ValueError(
                    f"{where}: expected at most the {most * self.cache.page_size} tokens that "
                    f"max_pages={most} holds, got {len(ids)}"
                )

    def events(self, *, tokens: bool) -> Generator[StreamEvent, None, None]:
        """Runs the job; token events only where `tokens`."""
        vocabulary = Vocabulary(self.tokenizer)
        queue: list[StreamEvent] = []
        teller = _Teller(vocabulary, queue) if tokens else None
        seconds = self.limits.max_seconds
        engine = Engine(
            self.model,
            self.cache,
            max_positions=self.max_positions,
            deadline=None if seconds is None else time.perf_counter() + seconds,
            bias=self.bias,
            drafter=self.drafter,
            tell=teller,
        )
        for i, (text, ids) in enumerate(zip(self.prompts, self.prompt_ids, strict=True)):
            engine.add(
                Run(
                    engine,
                    i,
                    text,
                    ids,
                    self.protocol,
                    vocabulary,
                    self.samplers[i],
                    self.limits,
                    self.seed + i,
                    self.end_tokens,
                    self.stop_texts,
                )
            )
        with self.bias or contextlib.nullcontext(), contextlib.closing(engine.run()) as steps:
            told: set[int] = set()
            for _ in steps:
                yield from queue
                queue.clear()
                yield from self._finished(engine, told)
            yield from queue
            yield from self._finished(engine, told)

    def _finished(self, engine: Engine, told: set[int]) -> Iterator[Finished]:
        for run in engine.runs:
            if run.finish is not None and run.index not in told:
                told.add(run.index)
                steps = engine.records(run.first_step)
                facts = {} if self.speculation is None else self.speculation.facts()
                trace = build_trace(run, type(self.model).__name__, steps, facts)
                yield Finished(run.index, trace)


class _Teller:
    """Turns what the engine tells into stream events."""

    def __init__(self, vocabulary: Vocabulary, queue: list[StreamEvent]) -> None:
        self._vocabulary, self._queue = vocabulary, queue
        self._detokenizers: dict[tuple[int, int], Detokenizer] = {}

    def __call__(self, prompt: int, what: Any) -> None:
        if isinstance(what, Event):
            self._queue.append(ThreadEvent(prompt, what))
            return
        thread, token, logprob = what
        key = (prompt, thread.log.id)
        if key not in self._detokenizers:
            self._detokenizers[key] = Detokenizer(self._vocabulary.pieces)
        text = self._detokenizers[key].push(token)
        self._queue.append(TokenEvent(prompt, key[1], thread.log.label, token, logprob, text))


def _check_prompts(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        got = (
            f"list of {sorted({type(x).__name__ for x in prompts})}"
            if isinstance(prompts, list)
            else type(prompt).__name__
        )
        raise TypeError(f"prompt: expected a str or a list of str, got {got}")
    if not prompts:
        raise ValueError("prompt: expected at least one prompt, got an empty list")
    for i, text in enumerate(prompts):
        if not text.strip():
            where = "prompt" if isinstance(prompt, str) else f"prompt[{i}]"
            raise ValueError(f"{where}: expected some text, got none")
    return prompts


def _check_tokenizer(tokenizer: Any, protocol: Protocol) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer: expected a tokenizer, got {type(tokenizer).__name__}")
    missing = missing_tags(tokenizer, protocol.tags())
    if missing:
        raise ValueError(
            f"tokenizer: protocol {protocol.name!r} needs {', '.join(missing)} as single tokens, "
            "which this tokenizer has not; fork_attn.reason.add_tags(model, tokenizer, "
            f"{protocol.name!r}) adds them (to a model that is trained on them afterwards)"
        )
    if protocol.needs_chat and tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer: protocol {protocol.name!r} asks a chat model, expected a tokenizer with a "
            "chat template, got one without"
        )


def _config(sampling: GenerationConfig | None, model: PreTrainedModel) -> GenerationConfig:
    if sampling is None:
        return GenerationConfig() if model.generation_config is None else model.generation_config
    if not isinstance(sampling, GenerationConfig):
        raise TypeError(f"sampling: expected a GenerationConfig, got {type(sampling).__name__}")
    return sampling


def _limits(limits: Limits | None, config: GenerationConfig) -> Limits:
    """The limits, with the sampling config's `max_new_tokens` for threads where they name none."""
    limits = Limits() if limits is None else limits
    if not isinstance(limits, Limits):
        raise TypeError(f"limits: expected Limits, got {type(limits).__name__}")
    if limits.max_thread_tokens is None and config.max_new_tokens is not None:
        return replace(limits, max_thread_tokens=config.max_new_tokens)
    return limits


def _end_tokens(
    config: GenerationConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The sampling config's end tokens, else the model's, else the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    for found in (config.eos_token_id, own, tokenizer.eos_token_id):
        if found is not None:
            return frozenset(found if isinstance(found, list) else [int(found)])
    return frozenset()


def _cache_of(model: PreTrainedModel, cache: ForkedKVCache | None) -> ForkedKVCache:
    """The model's cache; attaches a model that has none."""
    if not _link.is_attached(model):
        if cache is not None:
            raise ForeignBranch(
                f"cache: expected the cache of {type(model).__name__}, which is not attached to any"
            )
        return hf.attach(model)
    own = _link.link_of(model).cache
    if cache is not None and cache is not own:
        raise ForeignBranch(
            f"cache: expected the cache that {type(model).__name__} is attached to, got another"
        )
    return own
