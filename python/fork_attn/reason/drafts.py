"""Draft trees, and what makes them: the interface of drafters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fork_attn.reason.thread import Thread


class DraftTree:
    """Guesses at how a thread goes on: a tree of tokens (SpecInfer, arXiv 2305.09781).

    Attributes:
        tokens: of each node.
        parents: parents[i] < i is the node that node i follows; -1: the thread's last token.
    """

    __slots__ = ("_children", "parents", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int = -1) -> int:
        """The node with `token` behind `parent`, which is added if there is none yet."""
        key = (parent, token)
        node = self._children.get(key)
        if node is None:
            node = self._children[key] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def add_path(self, tokens: Sequence[int]) -> bool:
        """Adds a continuation from the thread's last token on; False if it was there already."""
        before, node = len(self.tokens), -1
        for token in tokens:
            node = self.add(token, node)
        return len(self.tokens) > before

    def child(self, node: int, token: int) -> int | None:
        """The node with `token` behind a node, or None."""
        return self._children.get((node, token))

    def cut(self, size: int) -> DraftTree:
        """The first `size` nodes, which are a tree too."""
        tree = DraftTree()
        for token, parent in zip(self.tokens[:size], self.parents[:size], strict=True):
            tree.add(token, parent)
        return tree

    def behind(self, count: int) -> list[int]:
        """Parents for `fork_attn.Draft`, with the tree behind a chain of `count` tokens."""
        return [*range(-1, count - 1), *(parent + count for parent in self.parents)]


class Drafter:
    """Proposes draft trees. This one proposes none; it is what runs without speculation.

    What a run does with its threads it says here first, so that a drafter with a cache of its own
    does the same there. Every method but `propose` and `settle` may be called for threads that the
    drafter does not know.
    """

    def propose(self, wanted: Mapping[Thread, int]) -> dict[Thread, DraftTree]:
        """Trees for threads that write, from what they see and their queues.

        Args:
            wanted: threads, and how deep a tree may be.
        """
        return {}

    def settle(self, thread: Thread, path: Sequence[int]) -> None:
        """Of the last tree of a thread the nodes `path` were accepted, maybe none."""

    def begin(self, thread: Thread) -> None:
        """A thread that sees nothing yet."""

    def fork(self, thread: Thread, children: Sequence[Thread]) -> None:
        """The children see what the thread sees."""

    def join(
        self, parent: Thread, taken: Sequence[Thread], position: str | int, rebase: bool
    ) -> None:
        """The parent will see what the children see; they end."""

    def select(self, parent: Thread, child: Thread) -> None:
        """The parent will see what the child sees, which ends."""

    def crop(self, thread: Thread, length: int) -> None:
        """The thread will see its first `length` tokens."""

    def move(self, thread: Thread) -> None:
        """The thread's next token will stand elsewhere."""

    def forget(self, thread: Thread) -> None:
        """The thread has ended."""

    def abort(self) -> None:
        """An interrupt may have left a step open."""

    def close(self) -> None:
        """The generation is over."""
