"""Protocol: how a model's text opens threads, ends them and joins them. And the list of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fork_attn.reason import records
from fork_attn.reason.trace_records import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fork_attn.reason.script import Script
    from fork_attn.reason.thread import Thread

_PROTOCOLS: dict[str, Protocol] = {}


class Protocol(ABC):
    """How a system thinks in threads. Subclasses are frozen dataclasses; see `docs/protocols.md`.

    Attributes:
        name: by which `generate` knows it.
        needs_chat: the prompt is a question that goes through the tokenizer's chat template.
        needs_ropes: its threads see tokens at other positions than those they were written at.
        watches: its threads see each other's tokens while they are written.
    """

    name: str
    needs_chat: ClassVar[bool] = False
    needs_ropes: ClassVar[bool] = False
    watches: ClassVar[bool] = False

    def tags(self) -> tuple[str, ...]:
        """Texts that must be one token each."""
        return ()

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """The prompt's tokens: as it stands, or as a question in the model's chat format."""
        if self.needs_chat:
            return self.chat_ids(tokenizer, self.question(prompt))
        # A text out of a chat template begins with that token already.
        begins = tokenizer.bos_token is not None and prompt.startswith(str(tokenizer.bos_token))
        return list(tokenizer(prompt, add_special_tokens=not begins)["input_ids"])

    def chat_ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """The tokens of a question in the model's chat format, up to where the answer begins."""
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def question(self, prompt: str) -> str:
        """What a chat model is asked."""
        return prompt

    @abstractmethod
    def run(self, root: Thread) -> Script:
        """Drives one prompt.

        Args:
            root: the thread with the prompt in its queue.

        Returns:
            The answer's spans, or None for what the root sees and wrote.
        """

    def cut_off(self, threads: Sequence[Thread]) -> tuple[Span, ...]:
        """The answer where a limit or a cancellation ends the run: what the live threads wrote,
        each token once."""
        spans: tuple[Span, ...] = ()
        for thread in threads:
            spans = records.union(spans, thread.answer())
        return spans


def register(protocol: Protocol) -> Protocol:
    """Makes a protocol known by its name.

    Raises:
        ValueError: the name is taken.
    """
    if protocol.name in _PROTOCOLS:
        raise ValueError(f"protocol: the name {protocol.name!r} is taken")
    _PROTOCOLS[protocol.name] = protocol
    return protocol


def protocols() -> dict[str, Protocol]:
    """All protocols that are known by name."""
    return dict(sorted(_PROTOCOLS.items()))


def get_protocol(protocol: str | Protocol) -> Protocol:
    """A protocol by name, or the one that was given.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a protocol.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if not isinstance(protocol, str):
        raise TypeError(f"protocol: expected a name or a Protocol, got {type(protocol).__name__}")
    if protocol not in _PROTOCOLS:
        raise ValueError(f"protocol: expected one of {sorted(_PROTOCOLS)}, got {protocol!r}")
    return _PROTOCOLS[protocol]
