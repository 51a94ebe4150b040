"""Protocols whose threads see each other while they write: Hogwild!, Group Think."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Script, together
from fork_attn.reason.thread import Thread


@dataclass(frozen=True)
class Hogwild(Protocol):
    """Hogwild! inference (arXiv 2504.06261), its contiguous layout.

    Each worker sees the prompt, then what every other worker has written so far as one block that
    grows, then a header that nobody else sees there, then its own text; positions run through the
    view without gaps, and queries are turned to them. A token of a step sees the other workers'
    tokens of the same step.

    Attributes:
        workers: their names; each begins with its `prefix`.
        task: the question; {question} is the user's, {names} the workers'.
        others: given to all before the others' texts; own: stands before a worker's own text.
        prefix: {name} is the worker's.
        finish: given behind all workers' texts for the final answer; empty leaves it out, and the
            answer is the text of the worker that ended first.
        first_ends_all: the first worker that ends ends them all.
    """

    name: str = "hogwild"
    needs_chat: ClassVar[bool] = True
    needs_ropes: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    workers: tuple[str, ...] = ("Alice", "Bob")
    task: str = (
        "{names} solve this together. Each sees the others' text while it is written. Divide the "
        "work, and do not do what another is doing already.\n\n{question}"
    )
    others: str = "\n\n### Work in progress (others)\n\n"
    own: str = "\n\n### Work in progress (own)\n\n"
    prefix: str = "**{name}:** "
    finish: str = "\n\n### Final answer\n\n"
    first_ends_all: bool = True

    def __post_init__(self) -> None:
        if len(self.workers) < 1:
            raise ValueError("workers: expected at least one name, got none")

    def question(self, prompt: str) -> str:
        return self.task.format(question=prompt, names=" and ".join(self.workers))

    def run(self, root: Thread) -> Script:
        root.inject(self.others)
        labels = [*self.workers, "own header"] if self.own else list(self.workers)
        threads = yield from root.fork(len(labels), labels=labels)
        workers, headers = threads[: len(self.workers)], threads[len(self.workers) :]
        if not workers:
            yield from root.write()
            return root.answer()
        for header in headers:
            header.inject(self.own)
            yield from header.flush()
        for worker, name in zip(workers, self.workers, strict=True):
            self._introduce(worker, [t for t in (*workers, *headers) if t is not worker])
            worker.inject(self.prefix.format(name=name))
        scripts = [worker.write() for worker in workers]
        ended = yield from together(scripts, first=self.first_ends_all)
        if not self.finish:
            return workers[ended[0] if self.first_ends_all else 0].answer()
        return (yield from self._conclude(root, workers, headers))

    def _introduce(self, worker: Thread, others: list[Thread]) -> None:
        for other in others:
            worker.watch(other)

    def _conclude(self, root: Thread, workers: list[Thread], headers: list[Thread]) -> Script:
        """All texts once more, one after another in plain causal order, and an answer to them."""
        texts = [worker.token_ids for worker in workers]
        ends = root.run.end_tokens
        yield from root.join([*workers, *headers], how="message", label="answer")
        for worker, ids in zip(workers, texts, strict=True):
            root.inject([token for token in ids if token not in ends], "copy", worker)
        root.inject(self.finish)
        yield from root.write()
        return root.answer()


@dataclass(frozen=True)
class GroupThink(Hogwild):
    """Group Think (arXiv 2505.11107): thinkers with a range of positions each.

    A token of a thinker sees all that the others wrote in earlier steps and in the same one, at the
    positions at which they wrote it.

    Attributes:
        positions: of each thinker's range.
    """

    name: str = "groupthink"
    needs_ropes: ClassVar[bool] = False
    workers: tuple[str, ...] = ("Thinker 1", "Thinker 2", "Thinker 3")
    others: str = ""
    own: str = ""
    positions: int = 1024

    def _introduce(self, worker: Thread, others: list[Thread]) -> None:
        for other in others:
            worker.watch(other, rebase=False)
        index = worker.path[-1][1]
        worker.move(worker.position + index * self.positions)


for _protocol in (Hogwild(), GroupThink()):
    register(_protocol)
