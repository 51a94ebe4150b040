"""Protocols whose threads never join: APAR, skeleton of thought."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Ended, Script, together
from fork_attn.reason.thread import Thread
from fork_attn.reason.trace_records import Span


@dataclass(frozen=True)
class Detached(Protocol):
    """APAR (arXiv 2401.06761): at a fork tag a child writes the detail, the thread the next point.

    Both go on at the fork's position, and neither ever sees the other. A child's pages return as
    soon as it is done. The answer reads as a tree: what stood before, the detail, the rest.

    Attributes:
        fork: the tag that forks; child: the tag that the child begins with.
    """

    name: str = "apar"
    fork: str = "[Fork]"
    child: str = "[Child]"

    def tags(self) -> tuple[str, ...]:
        return (self.fork, self.child)

    def run(self, root: Thread) -> Script:
        return (yield from self._write(root))

    def _write(self, thread: Thread) -> Script:
        """Writes to the end; returns the spans of all that was written below it, in order."""
        ended: Ended = yield from thread.write((self.fork,))
        log = thread.log
        if ended.reason != "stop" or ended.stop != self.fork:
            written = thread.run.without_prompt([Span(log.id, 0, len(log.token_ids))])
            if thread.parent is not None:
                thread.run.free([thread], "done")
            return written
        children = yield from thread.fork(1, labels=["detail"], detach=True)
        if not children:
            return (yield from self._write(thread))
        children[0].inject(self.child)
        detail, rest = yield from together([self._write(children[0]), self._write(thread)])
        before = thread.run.without_prompt([Span(log.id, 0, len(log.token_ids))])
        return (*before, *detail, *rest)


@dataclass(frozen=True)
class SkeletonOfThought(Protocol):
    """Skeleton of thought (arXiv 2307.15337): a list of points, then every point by itself.

    The points share the prompt, the skeleton and the second question as one context; each sees its
    own number and no other point.

    Attributes:
        ask: the first question; {question} is the user's.
        expand: the second; {question} and {skeleton}.
        point: what each point begins with; {n} is its number, {text} its line.
        points: the most that are expanded; point_tokens: of each at most.
    """

    name: str = "skeleton_of_thought"
    needs_chat: ClassVar[bool] = True
    ask: str = (
        "Write only the skeleton of an answer to the question below: a numbered list of 3 to 8 "
        "points, each of 3 to 5 words, and nothing else.\n\n{question}"
    )
    expand: str = (
        "Here are a question and the skeleton of its answer.\n\n{question}\n\n{skeleton}\n\n"
        "Write out one point of the skeleton in one or two sentences, and no other point."
    )
    point: str = "{n}. {text}"
    points: int = 10
    point_tokens: int = 128

    def question(self, prompt: str) -> str:
        return self.ask.format(question=prompt)

    def run(self, root: Thread) -> Script:
        yield from root.write()
        skeleton = root.said()[0]
        found = re.findall(r"(\d+)\.\s*([^\n]+)", skeleton)[: self.points]
        if not found:
            root.malformed("a skeleton without numbered points")
            return root.answer()
        stems = yield from root.spawn(1, labels=["points"])
        if not stems:
            return root.answer()
        stem: Thread = stems[0]
        question = self.expand.format(question=root.run.prompt, skeleton=skeleton)
        stem.inject(self.chat_ids(root.run.vocabulary.tokenizer, question), "message", root)
        points = yield from stem.fork(len(found), labels=[f"point {n}" for n, _ in found])
        if not points:
            return root.answer()
        for thread, (n, text) in zip(points, found, strict=True):
            thread.inject(self.point.format(n=n, text=text.strip()))
        yield from together([thread.write(max_tokens=self.point_tokens) for thread in points])
        return tuple(Span(t.log.id, 0, len(t.token_ids)) for t in points)


for _protocol in (Detached(), SkeletonOfThought()):
    register(_protocol)
