"""A prompt forks into threads with different openings; they join, and the conclusion sees all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fork_attn import Branch, hf
from fork_attn.demo.decode import Ending, Sampling, Written, decode
from fork_attn.demo.session import Session
from fork_attn.reason import Ended, Protocol, Thread, together
from fork_attn.reason import Script as ThreadScript

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PROMPT = "Should our town build a new bicycle path along the river?"
OPENINGS = ("The main benefit is", "The main risk is", "The cost is", "The first step is")
CLOSING = "\n\nTo sum up: the benefit is"
SYSTEM = "You are a helpful assistant."
THREAD_TOKENS = (24, 48)
CONCLUSION_TOKENS = (44, 80)
"""Generated tokens: the least before a sentence's end ends the text, and the most."""


@dataclass(frozen=True)
class Script:
    """What is given to the model, as text and as token ids."""

    prompt: str
    openings: tuple[str, ...]
    closing: str
    prompt_ids: tuple[int, ...]
    opening_ids: tuple[tuple[int, ...], ...]
    closing_ids: tuple[int, ...]
    thread_ending: Ending
    conclusion_ending: Ending

    @property
    def max_tokens(self) -> int:
        """The longest context that the script can lead to."""
        threads = sum(len(ids) + self.thread_ending.max_tokens for ids in self.opening_ids)
        conclusion = len(self.closing_ids) + self.conclusion_ending.max_tokens
        return len(self.prompt_ids) + threads + conclusion


def write_script(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    openings: tuple[str, ...] = OPENINGS,
    closing: str = CLOSING,
    thread_tokens: tuple[int, int] = THREAD_TOKENS,
    conclusion_tokens: tuple[int, int] = CONCLUSION_TOKENS,
) -> Script:
    """The script for a prompt, in the tokenizer's chat format where it has one.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("prompt: expected some text, got none")
    text = prompt.strip() + "\n"
    if tokenizer.chat_template is not None:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": prompt.strip()},
        ]
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def encode(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False)["input_ids"])

    return Script(
        prompt=prompt.strip(),
        openings=openings,
        closing=closing,
        prompt_ids=encode(text),
        opening_ids=tuple(encode(opening) for opening in openings),
        closing_ids=encode(closing),
        thread_ending=Ending(tokenizer, *thread_tokens),
        conclusion_ending=Ending(tokenizer, *conclusion_tokens),
    )


@dataclass(frozen=True)
class Round:
    """One way of doing the same work, measured.

    Attributes:
        written: what each thread generated.
        fork_seconds: until every thread had the prompt's context.
        decode_seconds: until every thread had ended, from its opening on.
        resume_seconds: from there to the logits of the conclusion's first token.
        read_again: tokens that were computed a second time for that.
        kv_bytes: of K and V of all threads when they had ended, prompt included.
    """

    written: tuple[Written, ...]
    fork_seconds: float
    decode_seconds: float
    resume_seconds: float
    read_again: int
    kv_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return sum(len(written.token_ids) for written in self.written) / self.decode_seconds


def fork_round(
    session: Session, root: Branch, script: Script, sampling: Sampling
) -> tuple[Round, Branch, torch.Tensor]:
    """Forks threads off `root`, which stays as it is, decodes them in one batch and joins them.

    Returns:
        The round, the branch that joined, and the (1, vocab) logits that follow the closing words.
    """
    began = time.perf_counter()
    (parent,) = root.fork()
    children = parent.fork(len(script.openings))
    forked = time.perf_counter()
    lanes = decode(
        lambda tokens: session.forward({children[lane]: ids for lane, ids in tokens.items()}),
        dict(enumerate(script.opening_ids)),
        script.thread_ending,
        sampling,
    )
    decoded = time.perf_counter()
    kv_bytes = session.cache.stats().kv_bytes
    resumed_from = time.perf_counter()
    written = tuple(lanes[lane] for lane in range(len(children)))
    pending = {
        child: text.pending[0]
        for child, text in zip(children, written, strict=True)
        if text.pending
    }
    hf.join(parent, children, pending=pending)
    logits = session.forward({parent: script.closing_ids})
    resumed = time.perf_counter()
    result = Round(
        written=written,
        fork_seconds=forked - began,
        decode_seconds=decoded - forked,
        resume_seconds=resumed - resumed_from,
        read_again=0,
        kv_bytes=kv_bytes,
    )
    return result, parent, logits


@dataclass(frozen=True)
class Aspects(Protocol):
    """The script as a protocol: a thread for each opening, a union join, the conclusion."""

    script: Script
    name: str = "aspects"

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        return list(self.script.prompt_ids)

    def run(self, root: Thread) -> ThreadScript:
        script = self.script
        threads = yield from root.fork(len(script.openings), labels=script.openings)
        for thread, ids in zip(threads, script.opening_ids, strict=True):
            thread.inject(ids)
        yield from together([_text(thread, script.thread_ending) for thread in threads])
        yield from root.join(threads, label="conclusion")
        root.inject(script.closing_ids)
        yield from _text(root, script.conclusion_ending)


def _text(thread: Thread, ending: Ending) -> ThreadScript:
    """Writes until a line's end, or a sentence's from the ending's fewest tokens on."""
    ended: Ended = yield from thread.write(texts=("\n",), max_tokens=ending.min_tokens)
    if ended.reason == "limit" and ended.note == "max_tokens":
        rest = ending.max_tokens - ending.min_tokens
        ended = yield from thread.write(texts=("\n", ".", "!", "?"), max_tokens=rest)
    if ended.reason == "eos":
        thread.drop_pending()
    return ended
