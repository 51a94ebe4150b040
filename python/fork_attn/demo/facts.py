"""Three threads each read one fact; after the join the parent knows all three."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fork_attn.demo.decode import Ending, Sampling, decode
from fork_attn.demo.session import Session

PREFIX = "Here are some facts about the people and places in a small town.\n"
ASK = "\nSo, as we know, "


@dataclass(frozen=True)
class Fact:
    """A question, as the beginning of a sentence, and its end, which only a reader can know."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}."

    def is_answer(self, text: str) -> bool:
        """Whether the text begins with the answer, as whole words."""
        return re.match(rf"{re.escape(self.answer)}\b", text) is not None


FACTS = (
    Fact("Anna's favourite colour is", "purple"),
    Fact("Boris owns a small", "red bicycle"),
    Fact("The library in town closes at", "nine"),
)


@dataclass(frozen=True)
class Answers:
    """What the parent answers about each of `facts`, and what it does without the join."""

    facts: tuple[Fact, ...]
    with_join: tuple[str, ...]
    without_join: tuple[str, ...]

    def score(self, answers: Sequence[str]) -> int:
        """How many of the answers begin with the fact."""
        return sum(fact.is_answer(answer) for fact, answer in zip(self.facts, answers, strict=True))

    @property
    def passed(self) -> bool:
        return self.score(self.with_join) == len(self.facts)


def ask(session: Session, facts: tuple[Fact, ...] = FACTS) -> Answers:
    """Forks a thread per fact, joins them, and asks about all facts with and without the join.

    Every question is asked on a fork of its own, all in one batch. Leaves the cache as it was.
    """
    cache = session.cache
    root = cache.new_branch()
    session.forward({root: session.encode(PREFIX)})
    readers = root.fork(len(facts))
    session.forward(
        {reader: session.encode(fact.text) for reader, fact in zip(readers, facts, strict=True)}
    )
    (unjoined,) = root.fork()
    root.join(readers)

    askers = root.fork(len(facts)) + unjoined.fork(len(facts))
    questions = [session.encode(ASK + fact.question) for fact in (*facts, *facts)]
    written = decode(
        lambda tokens: session.forward({askers[lane]: ids for lane, ids in tokens.items()}),
        dict(enumerate(questions)),
        Ending(session.tokenizer, min_tokens=1, max_tokens=6),
        Sampling(),
    )
    answers = tuple(
        _first_line(session.decode(written[lane].token_ids)) for lane in range(len(askers))
    )
    cache.free([root, unjoined, *askers])
    return Answers(facts, answers[: len(facts)], answers[len(facts) :])


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].rstrip(" .")
