"""Searches over a tree of thoughts: breadth first, and best first."""

from __future__ import annotations

from dataclasses import dataclass

from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Ended, Script, together
from fork_attn.reason.systems.selection import Scorer, mean_logprob
from fork_attn.reason.thread import Thread


@dataclass(frozen=True)
class _TreeSearch(Protocol):
    """A thought is what a thread writes up to the text `thought_ends`.

    Attributes:
        scorer: of a whole answer so far; None takes the mean log-probability of its tokens.
        branching: thoughts tried after each thought.
        thought_ends, thought_tokens: what ends a thought.
    """

    name: str
    scorer: Scorer | None = None
    branching: int = 3
    thought_ends: str = "\n"
    thought_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("branching", "thought_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")

    def _expand(self, nodes: list[Thread]) -> Script:
        """Forks every node and lets the children write one thought; the nodes end.

        Returns:
            (thought, whether it ended the text) of all children that a limit did not refuse.
        """
        forks = yield from together([node.fork(self.branching) for node in nodes])
        children = [child for fork in forks for child in fork]
        for node, fork in zip(nodes, forks, strict=True):
            if fork and node.depth:  # the root stays, as what the run falls back on
                node.run.free([node], "done")
        ends: list[Ended] = []
        if children:
            writes = [
                child.write(texts=(self.thought_ends,), max_tokens=self.thought_tokens)
                for child in children
            ]
            ends = yield from together(writes)
        over = ("eos", "max_thread_tokens")
        return [
            (child, ended.reason == "eos" or ended.note in over or bool(child.exhausted))
            for child, ended in zip(children, ends, strict=True)
        ]

    def score(self, thread: Thread) -> float:
        """The score of all that leads to a thought."""
        if self.scorer is not None:
            return self.scorer(thread.said()[0])
        return mean_logprob(thread)


@dataclass(frozen=True)
class TreeOfThoughts(_TreeSearch):
    """Breadth first (arXiv 2305.10601): the `keep` best thoughts of each level go on.

    Attributes:
        keep: thoughts of a level that go on.
        levels: thoughts of an answer at most.
    """

    name: str = "tree_of_thoughts"
    keep: int = 2
    levels: int = 3

    def run(self, root: Thread) -> Script:
        frontier, done = [root], list[Thread]()
        for _ in range(self.levels):
            thoughts = yield from self._expand(frontier)
            if not thoughts:
                break
            order = sorted(thoughts, key=lambda pair: self.score(pair[0]), reverse=True)
            for thread, _ in order[self.keep :]:
                thread.prune("not among the best")
            done += [thread for thread, over in order[: self.keep] if over]
            frontier = [thread for thread, over in order[: self.keep] if not over]
            if not frontier:
                break
        best = max([*done, *frontier], key=self.score)
        return best.answer()


@dataclass(frozen=True)
class BestFirst(_TreeSearch):
    """Best first, several thoughts at once, whatever their depth, as in DPTS (arXiv 2502.16235).

    Attributes:
        at_once: thoughts that are expanded together.
        expansions: of thoughts altogether.
        answers: whole answers after which the search ends.
    """

    name: str = "dpts"
    at_once: int = 2
    expansions: int = 8
    answers: int = 2

    def run(self, root: Thread) -> Script:
        frontier, left = [root], self.expansions
        done: list[Thread] = []
        while frontier and left > 0 and len(done) < self.answers:
            frontier.sort(key=self.score, reverse=True)
            chosen = frontier[: min(self.at_once, left)]
            left -= len(chosen)
            thoughts = yield from self._expand(chosen)
            frontier = [thread for thread in frontier if thread not in chosen and thread.alive]
            if not thoughts:
                break
            done += [thread for thread, over in thoughts if over]
            frontier += [thread for thread, over in thoughts if not over]
        best = max(done or frontier or [root], key=self.score)
        return best.answer()


for _protocol in (TreeOfThoughts(), BestFirst()):
    register(_protocol)
