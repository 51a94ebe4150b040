"""A prompt forks into threads with different openings; they join, and the conclusion sees all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fork_attn import Branch
from fork_attn.demo.decode import Ending, Sampling, Watch, Written, decode
from fork_attn.demo.session import Fed, Session
from fork_attn.demo.trace import Finish, Node, Trace, page_runs

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
    session: Session, root: Branch, script: Script, sampling: Sampling, watch: Watch | None = None
) -> tuple[Round, Branch, list[Branch], torch.Tensor]:
    """Forks threads off `root`, which stays as it is, decodes them in one batch and joins them.

    Returns:
        The round, the branch that joined, the branches that it joined (freed, but keys of
        `session.fed`), and the (1, vocab) logits that follow the closing words.
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
        watch,
    )
    decoded = time.perf_counter()
    kv_bytes = session.cache.stats().kv_bytes
    resumed_from = time.perf_counter()
    written = tuple(lanes[lane] for lane in range(len(children)))
    pending = {
        child: text.pending for child, text in zip(children, written, strict=True) if text.pending
    }
    # What fork_attn.hf.join(pending=...) does; here in two calls, so that the trace sees the slots.
    if pending:
        session.forward(pending)
    parent.join(children)
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
    return result, parent, children, logits


def think(
    session: Session,
    root: Branch,
    script: Script,
    sampling: Sampling,
    watch: Watch | None = None,
    on_join: Callable[[], Watch | None] = lambda: None,
) -> Trace:
    """The whole script: threads, join, conclusion. Frees all but `root`, which holds the prompt.

    Args:
        session: the model.
        root: a branch that has been fed the script's prompt through the session.
        script: the texts.
        sampling: how tokens are picked; the conclusion is lane n of n threads.
        watch: told of the threads' tokens.
        on_join: called at the join; what it returns is told of the conclusion's tokens.
    """
    result, parent, children, logits = fork_round(session, root, script, sampling, watch)
    lane = len(children)
    conclusion = decode(
        lambda tokens: session.forward({parent: tokens[lane]}),
        {lane: script.closing_ids},
        script.conclusion_ending,
        sampling,
        on_join(),
        first=logits,
    )[lane]
    if conclusion.pending:
        session.forward({parent: conclusion.pending})
    fed = [session.fed.pop(branch) for branch in (*children, parent)]
    fed.insert(0, session.fed[root])
    session.cache.free([parent])
    return Trace(
        model=session.name,
        dtype=str(session.cache.dtype).removeprefix("torch."),
        sampling=str(sampling),
        page_size=session.cache.page_size,
        nodes=_nodes(session, script, fed, [*result.written, conclusion]),
    )


def _nodes(
    session: Session, script: Script, fed: Sequence[Fed], written: Sequence[Written]
) -> tuple[Node, ...]:
    n = len(script.openings)
    labels = [script.prompt, *script.openings, script.closing.strip()]
    given = [script.prompt_ids, *script.opening_ids, script.closing_ids]
    finish: list[Finish] = ["read", *(text.finish for text in written)]

    def node(index: int, record: Fed) -> Node:
        return Node(
            id=index,
            kind="prompt" if index == 0 else "conclusion" if index > n else "thread",
            label=labels[index],
            parents=tuple(range(index)) if index > n else (0,) if index else (),
            position=record.position,
            token_ids=tuple(record.token_ids),
            given=len(given[index]),
            text=session.decode(record.token_ids),
            pages=page_runs(record.slots, session.cache.page_size),
            finish=finish[index],
            steps=(record.calls[0], record.calls[-1]),
        )

    return tuple(node(index, record) for index, record in enumerate(fed))
