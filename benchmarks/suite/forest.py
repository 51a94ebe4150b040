"""One description of a tree of contexts, which every implementation is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Node:
    """Tokens behind one parent, behind several (a join: behind all of theirs), or behind none."""

    parents: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Query:
    """A branch that ends at a node and adds tokens in the step, one row each.

    Attributes:
        node: index of the node.
        new: tokens in a row, each seeing those before it; ignored where there is a draft.
        draft: parents[i] < i is the token that token i follows, -1 the branch's end.
    """

    node: int
    new: int = 1
    draft: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        return self.new if self.draft is None else len(self.draft)

    @cached_property
    def sees(self) -> tuple[tuple[int, ...], ...]:
        """Which of the new tokens each one sees, itself included."""
        if self.draft is None:
            return tuple(tuple(range(i + 1)) for i in range(self.new))
        seen: list[tuple[int, ...]] = []
        for i, parent in enumerate(self.draft):
            seen.append((*(seen[parent] if parent >= 0 else ()), i))
        return tuple(seen)


@dataclass(frozen=True)
class Piece:
    """A stretch of context that the same queries see: a node, or a chain of nodes, of the tree that
    the queries' paths span."""

    parent: int  # -1: none
    nodes: tuple[int, ...]
    tokens: int
    begin: int  # first query that sees it
    end: int  # one past the last
    offset: int  # tokens before it

    @property
    def queries(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Forest:
    """Nodes, parents before children, and the queries of one step, sorted along the tree."""

    nodes: tuple[Node, ...]
    queries: tuple[Query, ...]

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that each node's context consists of, in order, itself last."""
        paths: list[tuple[int, ...]] = []
        for index, node in enumerate(self.nodes):
            path = dict.fromkeys(n for parent in node.parents for n in paths[parent])
            paths.append((*path, index))
        return tuple(paths)

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Tokens that each query sees before its own."""
        return tuple(sum(self.nodes[n].tokens for n in self.paths[q.node]) for q in self.queries)

    @property
    def num_rows(self) -> int:
        return sum(q.rows for q in self.queries)

    @cached_property
    def row_begin(self) -> tuple[int, ...]:
        """First row of each query, and the number of rows."""
        begins = [0]
        for query in self.queries:
            begins.append(begins[-1] + query.rows)
        return tuple(begins)

    @cached_property
    def unique_slots(self) -> int:
        """Tokens that some query sees, the new ones included, each once."""
        seen = {n for q in self.queries for n in self.paths[q.node]}
        return sum(self.nodes[n].tokens for n in seen) + self.num_rows

    @property
    def copied_slots(self) -> int:
        """Tokens that the queries see, each once per query."""
        return sum(self.contexts) + self.num_rows

    @property
    def reuse(self) -> float:
        """Tokens that the queries see together over tokens that exist."""
        return self.copied_slots / self.unique_slots

    @property
    def visible_pairs(self) -> int:
        """Pairs of a row and a token that it sees."""
        pairs = zip(self.queries, self.contexts, strict=True)
        return sum(q.rows * context + sum(map(len, q.sees)) for q, context in pairs)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The tree of the queries' paths, chains taken together, parents before children."""
        paths = [self.paths[q.node] for q in self.queries]
        found: list[Piece] = []

        def visit(begin: int, end: int, depth: int, parent: int, offset: int) -> None:
            while begin < end and len(paths[begin]) <= depth:  # ends at the parent itself
                begin += 1
            while begin < end:
                first = paths[begin]
                stop = begin + 1
                while (
                    stop < end and len(paths[stop]) > depth and paths[stop][depth] == first[depth]
                ):
                    stop += 1
                last = depth + 1
                same = paths[begin:stop]
                while all(len(p) > last and p[last] == first[last] for p in same):
                    last += 1
                nodes = first[depth:last]
                tokens = sum(self.nodes[n].tokens for n in nodes)
                found.append(Piece(parent, nodes, tokens, begin, stop, offset))
                visit(begin, stop, last, len(found) - 1, offset + tokens)
                begin = stop

        visit(0, len(paths), 0, -1, 0)
        return tuple(found)

    @cached_property
    def leaf_piece(self) -> tuple[int, ...]:
        """The last piece of each query's path."""
        last = [-1] * len(self.queries)
        for index, piece in enumerate(self.pieces):
            for q in range(piece.begin, piece.end):
                last[q] = index
        return tuple(last)

    def extends(self, query: int) -> bool:
        """Whether the query's last piece is its own, so that its new tokens simply go on there."""
        return self.pieces[self.leaf_piece[query]].queries == 1


def sorted_forest(nodes: Sequence[Node], queries: Sequence[Query]) -> Forest:
    """The forest with its queries in the order of a walk of the tree, depth first."""
    paths = Forest(tuple(nodes), ()).paths
    return Forest(tuple(nodes), tuple(sorted(queries, key=lambda q: paths[q.node])))


def uniform(
    nodes: Sequence[int], tokens: Sequence[int], new: int = 1, draft: tuple[int, ...] | None = None
) -> Forest:
    """`nodes[i]` nodes of `tokens[i]` tokens on level i; every node of the last level queries."""
    made: list[Node] = []
    above: list[int] = []
    for depth, (count, length) in enumerate(zip(nodes, tokens, strict=True)):
        fan = count // max(len(above), 1)
        parents = [(above[i // fan],) if depth else () for i in range(count)]
        above = list(range(len(made), len(made) + count))
        made += [Node(parent, length) for parent in parents]
    return sorted_forest(made, [Query(node, new, draft) for node in above])
