"""Thinking in threads through `model.generate(custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from fork_attn.errors import Unsupported
from fork_attn.reason.job import Finished, Job
from fork_attn.reason.limits import Limits
from fork_attn.reason.protocol import Protocol, get_protocol
from fork_attn.reason.speculation import Speculation
from fork_attn.reason.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


class CustomGenerate:
    """A decoding loop for `model.generate(input_ids, custom_generate=CustomGenerate(...))`.

    The call returns prompts with their answers, padded on the right. Its own logits processors are
    used; `max_new_tokens` is for each thread.

    Args:
        tokenizer: the model's.
        protocol: as for `generate`.
        limits, seed, speculation: as for `generate`.

    Attributes:
        traces: of the last call, one for each prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        protocol: str | Protocol,
        *,
        limits: Limits | None = None,
        seed: int = 0,
        speculation: Speculation | None = None,
    ) -> None:
        self.tokenizer, self.protocol = tokenizer, get_protocol(protocol)
        self.limits = Limits() if limits is None else limits
        self.seed, self.speculation = seed, speculation
        self.traces: list[Trace] = []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriteria],
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        attention_mask = model_kwargs.get("attention_mask")
        for criterion in stopping_criteria:
            if not isinstance(criterion, _KNOWN_CRITERIA):
                raise Unsupported(
                    f"stopping_criteria: {type(criterion).__name__} is not part of fork_attn.reason"
                )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, real, strict=True)]
        job = Job(
            model,
            self.tokenizer,
            [str(self.tokenizer.decode(ids)) for ids in prompts],
            self.protocol,
            None,
            generation_config,
            self._limits(generation_config, input_ids.shape[1]),
            self.seed,
            speculation=self.speculation,
            prompt_ids=prompts,
            processors=logits_processor,
        )
        done = [event for event in job.events(tokens=False) if isinstance(event, Finished)]
        self.traces = [event.trace for event in sorted(done, key=lambda event: event.prompt)]
        rows = [torch.tensor([*t.prompt_ids, *t.token_ids]) for t in self.traces]
        padding = generation_config.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=0 if padding is None else float(padding)
        ).to(input_ids.device)

    def _limits(self, config: GenerationConfig, prompt: int) -> Limits:
        limits = self.limits
        if limits.max_thread_tokens is None and config.max_length is not None:
            limits = replace(limits, max_thread_tokens=max(config.max_length - prompt, 1))
        if limits.max_seconds is None and config.max_time is not None:
            limits = replace(limits, max_seconds=config.max_time)
        return limits
