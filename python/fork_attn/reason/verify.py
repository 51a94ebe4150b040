"""Verifying the draft trees of all threads of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fork_attn.reason.drafts import Drafter, DraftTree

if TYPE_CHECKING:
    from fork_attn.reason.run import Run
    from fork_attn.reason.thread import Thread


_LONGEST_QUEUE = 64  # tokens behind which nothing is drafted: a prompt's part of a step


def propose(
    drafter: Drafter, fed: Sequence[Thread], max_positions: float, pages: dict[Run, int]
) -> dict[Thread, DraftTree]:
    """Draft trees for the writers of a step, no larger than their limits allow.

    Args:
        drafter: proposes them.
        fed: the step's threads.
        max_positions: the model's.
        pages: of prompts with `max_pages`, what they have once the step's queues are fed; the
            drafts' are added.
    """
    wanted = {thread: most for thread in fed if (most := _depth(thread, max_positions)) > 0}
    trees = drafter.propose(wanted) if wanted else {}
    for thread, tree in trees.items():
        limit = thread.run.limits.max_pages
        if limit is not None:
            size = min(len(tree), thread.slots(limit - pages[thread.run]))
            pages[thread.run] += thread.new_pages(size) - thread.new_pages()
            trees[thread] = tree.cut(size)
    for thread in [thread for thread, tree in trees.items() if not len(tree)]:
        drafter.settle(thread, ())
        del trees[thread]
    return trees


def _depth(thread: Thread, max_positions: float) -> int:
    """How many draft tokens a thread could keep."""
    queue = len(thread.queue)
    if thread.goal != "write" or queue > _LONGEST_QUEUE:
        return 0
    most = min(thread.run.left - 1, max_positions - thread.position - queue)
    return int(most if thread.left < 0 else min(most, thread.left - 1))


class Verification:
    """Walks down the trees of one step, one token of each thread at a time.

    Each round is what a step without drafts would have been: every thread that is still on a path
    of its tree picks a token, from the logits at its node. Threads of a race (`together` with
    `first`) stop together, as who ends first must not depend on whose drafts were better.

    Args:
        fed: the step's threads, in row order, with their queues.
        trees: of those that have one.
        active: all threads with a goal.

    Attributes:
        rows: which of the step's tokens logits are needed for: each thread's last, and its tree's.
        first: for each of `fed` the place of its last token in `rows`.
        paths: for each tree the nodes that were accepted.
    """

    def __init__(
        self, fed: Sequence[Thread], trees: Mapping[Thread, DraftTree], active: Iterable[Thread]
    ) -> None:
        self._trees = trees
        self.paths: dict[Thread, list[int]] = {thread: [] for thread in trees}
        self.rows: list[int] = []
        self.first: list[int] = []
        self._queued: dict[Thread, int] = {}
        self._first_of: dict[Thread, int] = {}
        end = 0
        for thread in fed:
            last, tree = end + len(thread.queue) - 1, trees.get(thread)
            end = last + 1 + (0 if tree is None else len(tree))
            self._queued[thread] = len(thread.queue)
            self._first_of[thread] = len(self.rows)
            self.first.append(len(self.rows))
            self.rows += range(last, end)
        races = ((thread, thread.task.race()) for thread in active)
        self._races = {thread: race for thread, race in races if race is not None}

    def accepted(self, thread: Thread) -> list[int]:
        """What the step keeps of a thread's draft: its queue, and the nodes that were accepted."""
        queue = self._queued[thread]
        return [*range(queue), *(queue + node for node in self.paths[thread])]

    def follow(self, writers: Sequence[Thread], over: set[Run]) -> tuple[list[Thread], list[int]]:
        """The threads whose last token is in their tree, and which go on.

        Args:
            writers: have just picked a token, which is all that their queues hold.
            over: prompts that may pick no more.

        Returns:
            The threads, and the places of their tokens in `rows`.
        """
        going: dict[Thread, int] = {}
        for thread in writers:
            tree = self._trees.get(thread)
            if tree is not None and thread.goal == "write" and thread.run not in over:
                path = self.paths[thread]
                node = tree.child(path[-1] if path else -1, thread.queue[0])
                if node is not None:
                    going[thread] = node
        if self._races:
            stopped = {race for thread, race in self._races.items() if thread not in going}
            going = {t: n for t, n in going.items() if self._races.get(t) not in stopped}
        for thread, node in going.items():
            self.paths[thread].append(node)
        return list(going), [self._first_of[thread] + 1 + node for thread, node in going.items()]
