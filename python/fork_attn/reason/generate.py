"""generate and stream: prompts in, traces out."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, overload

from fork_attn.reason.job import Finished, Job, StreamEvent
from fork_attn.reason.limits import Limits
from fork_attn.reason.protocol import Protocol
from fork_attn.reason.speculation import Speculation
from fork_attn.reason.trace import Trace

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fork_attn import ForkedKVCache


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    protocol: str | Protocol,
    cache: ForkedKVCache | None = None,
    sampling: GenerationConfig | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    speculation: Speculation | None = None,
) -> Trace: ...
@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[str],
    *,
    protocol: str | Protocol,
    cache: ForkedKVCache | None = None,
    sampling: GenerationConfig | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    speculation: Speculation | None = None,
) -> list[Trace]: ...
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str],
    *,
    protocol: str | Protocol,
    cache: ForkedKVCache | None = None,
    sampling: GenerationConfig | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    speculation: Speculation | None = None,
) -> Trace | list[Trace]:
    """Lets a model think in threads.

    All threads of all prompts run in one ragged forward a step. However the call ends, all its
    pages are free again.

    Args:
        model: a decoder-only transformers model; attached here if it is not attached yet.
        tokenizer: the model's.
        prompt: a text, or several.
        protocol: how threads fork and join; a name out of `protocols()`, or a `Protocol`.
        cache: the model's cache; None takes it.
        sampling: do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id,
            stop_strings and the like; what is None is not done. None: the model's own config.
        limits: see `Limits`.
        seed: of the first prompt; prompt i of a list draws from seed + i. Each thread has a seed
            of its own that follows from its place in the tree, whatever runs beside it.
        speculation: what drafts tokens: `PromptLookup`, `DraftModel`. It changes how many forwards
            a generation takes, and not what threads say.

    Returns:
        A trace, or one for each prompt of a list.

    Raises:
        ValueError, TypeError: an argument is off; nothing was done.
        Unsupported: the model or the sampling config asks for what is not done, by name.
    """
    job = Job(
        model, tokenizer, prompt, protocol, cache, sampling, limits, seed, speculation=speculation
    )
    traces: dict[int, Trace] = {}
    for event in job.events(tokens=False):
        if isinstance(event, Finished):
            traces[event.prompt] = event.trace
    return traces[0] if isinstance(prompt, str) else [traces[i] for i in range(len(traces))]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str],
    *,
    protocol: str | Protocol,
    cache: ForkedKVCache | None = None,
    sampling: GenerationConfig | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    speculation: Speculation | None = None,
) -> Generator[StreamEvent, None, None]:
    """`generate`, event by event as it happens.

    Closing the iterator, or an error in the loop over it, ends the generation and frees its pages.
    Arguments are checked at the call, before the first event.

    Yields:
        `TokenEvent`, `ThreadEvent`, and one `Finished` with the trace for each prompt.
    """
    job = Job(
        model, tokenizer, prompt, protocol, cache, sampling, limits, seed, speculation=speculation
    )
    return job.events(tokens=True)
