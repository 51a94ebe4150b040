"""Branches as one flat training sequence: tokens, positions, who sees whom, and labels.

The mask is given by ranges, one entry a segment instead of one a pair of tokens; it can be expanded
to the dense mask, or handed to a kernel that takes ranges. A token is predicted by the row of the
token before it in its own branch. That row may predict several tokens, the first of each child:
so labels are pairs `(row, target)`. The usual shift by one would let the last token of one child
predict the first token of the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fork_attn.errors import Unsupported
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import ThreadRecord


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` (excluded) of the flat sequence, written one after another.

    Attributes:
        sees: ranges `(low, high)` of other tokens that all of them see, ascending and apart. A
            token also sees its own segment up to itself.
    """

    start: int
    end: int
    sees: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TrainingExample:
    """S tokens of all branches in one sequence.

    Attributes:
        token_ids: S token ids.
        position_ids: their positions; threads that ran side by side may share positions.
        segments: who sees whom, the sequence from its start to its end.
        predicted_from: per token the index of the token whose row predicts it, the one before it in
            its own branch; -1 for the first.
        generated: per token whether the model wrote it. Only these have a loss: a prompt, a tag
            that an engine injected and tokens copied into a text join have none.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    predicted_from: tuple[int, ...]
    generated: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def dense_mask(self) -> Tensor:
        """(S, S) bool: row i may attend to column j. What attention with an explicit mask takes."""
        mask = torch.zeros(len(self), len(self), dtype=torch.bool)
        for segment in self.segments:
            rows = slice(segment.start, segment.end)
            for low, high in segment.sees:
                mask[rows, low:high] = True
            length = segment.end - segment.start
            mask[rows, rows] = torch.ones(length, length, dtype=torch.bool).tril()
        return mask

    def labels(self) -> tuple[Tensor, Tensor]:
        """(n,) int64 rows and the (n,) int64 token ids they predict; a row may occur twice."""
        pairs = [
            (row, token)
            for row, token, trained in zip(
                self.predicted_from, self.token_ids, self.generated, strict=True
            )
            if trained and row >= 0
        ]
        table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def loss(self, logits: Tensor) -> Tensor:
        """The mean cross-entropy of the generated tokens.

        Args:
            logits: (S, vocab), of one pass over the flat sequence with its mask and positions.

        Raises:
            ValueError: logits has another number of rows, or no token was generated.
        """
        if logits.ndim != 2 or len(logits) != len(self):
            raise ValueError(f"logits: expected ({len(self)}, vocab), got {tuple(logits.shape)}")
        rows, targets = (index.to(logits.device) for index in self.labels())
        if not len(rows):
            raise ValueError("logits: no token of this example was generated, so it has no loss")
        return torch.nn.functional.cross_entropy(logits[rows].float(), targets)


class Packer:
    """Builds a `TrainingExample` from what branches wrote, in the order in which it is added."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._position_ids: list[int] = []
        self._segments: list[Segment] = []
        self._predicted_from: list[int] = []
        self._generated: list[bool] = []

    def add(
        self,
        token_ids: Sequence[int],
        *,
        position: int,
        sees: Iterable[range] = (),
        generated: bool | Sequence[bool] = True,
        predicted_from: int | None = None,
    ) -> range:
        """Appends tokens that one branch wrote at consecutive positions.

        Args:
            token_ids: at least one.
            position: of the first.
            sees: the flat tokens of the branch's context, in context order, as ranges that earlier
                calls gave, or parts of them.
            generated: whether the model wrote them, all alike or one by one.
            predicted_from: the flat index of the row that predicts the first token; None takes the
                last token of the context.

        Returns:
            Where they lie in the flat sequence.

        Raises:
            ValueError: no tokens, a negative position, a context that is not there yet, or
                `generated` of another length.
        """
        start = len(self._token_ids)
        context = [part for part in sees if len(part)]
        flags = [generated] * len(token_ids) if isinstance(generated, bool) else list(generated)
        if not token_ids:
            raise ValueError("token_ids: expected at least one, got none")
        if len(flags) != len(token_ids):
            raise ValueError(f"generated: expected {len(token_ids)} values, got {len(flags)}")
        if position < 0:
            raise ValueError(f"position: expected at least 0, got {position}")
        for part in context:
            if part.step != 1 or not 0 <= part.start < part.stop <= start:
                raise ValueError(f"sees: expected ranges within 0 to {start}, got {part}")
        if predicted_from is None:
            predicted_from = context[-1].stop - 1 if context else -1
        elif not -1 <= predicted_from < start:
            raise ValueError(f"predicted_from: expected -1 to {start - 1}, got {predicted_from}")
        end = start + len(token_ids)
        self._token_ids += token_ids
        self._position_ids += range(position, position + len(token_ids))
        self._segments.append(Segment(start, end, merge_ranges(context)))
        self._predicted_from += [predicted_from, *range(start, end - 1)]
        self._generated += flags
        return range(start, end)

    def build(self) -> TrainingExample:
        return TrainingExample(
            tuple(self._token_ids),
            tuple(self._position_ids),
            tuple(self._segments),
            tuple(self._predicted_from),
            tuple(self._generated),
        )


def merge_ranges(parts: Iterable[range]) -> tuple[tuple[int, int], ...]:
    """The union of ranges, as ascending ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for part in sorted(parts, key=lambda part: part.start):
        if merged and part.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], part.stop))
        else:
            merged.append((part.start, part.stop))
    return tuple(merged)


def from_trace(
    trace: Trace, trained: Callable[[ThreadRecord], bool] | None = None
) -> TrainingExample:
    """A recorded generation as a training example, token for token as it was generated.

    Threads lie in the order of their records. Tokens that were sampled but never fed, such as an
    end token, are in it for their label's sake; nobody sees them. A bias on keys and values, as in
    ParaThinker, is not part of it.

    Args:
        trace: of any protocol.
        trained: which threads have a loss, for example those that were not pruned; None: all.
            Tokens that were injected never have one.

    Raises:
        Unsupported: a join or a watch moved keys to other positions (`rebase`): every reader then
            has positions of its own, which one flat sequence cannot hold.
    """
    moved = any(event.join == "rebase" for event in trace.events)
    if moved or any(watch.rebase for thread in trace.threads for watch in thread.watches):
        raise Unsupported(
            f"trace: {trace.protocol!r} moved keys to other positions (rebase), which a flat "
            "sequence with one position a token cannot hold"
        )
    starts = [0, *accumulate(len(thread.token_ids) for thread in trace.threads)]
    segments: list[Segment] = []
    predicted_from: list[int] = []
    generated: list[bool] = []
    position_ids: list[int] = []
    for thread, start in zip(trace.threads, starts, strict=False):
        context = [
            range(starts[s.thread] + s.start, starts[s.thread] + s.end) for s in thread.context
        ]
        positions = _positions(trace, thread)
        for low, high, watched in _watched_runs(trace, thread):
            others = [range(starts[t], starts[t] + seen) for t, seen in watched if seen]
            sees = merge_ranges([*context, *others, *_own(thread, low, start)])
            segments.append(Segment(start + low, start + high, sees))
        wanted = trained is None or trained(thread)
        row = _row_before(trace, thread, starts) if thread.token_ids else -1
        for i, position in enumerate(thread.positions):
            predicted_from.append(row)
            row = row if position is None else start + i
        generated += [wanted and not given for given in thread.injected]
        position_ids += positions
    token_ids = tuple(token for thread in trace.threads for token in thread.token_ids)
    return TrainingExample(
        token_ids, tuple(position_ids), tuple(segments), tuple(predicted_from), tuple(generated)
    )


def _positions(trace: Trace, thread: ThreadRecord) -> list[int]:
    """Of each token; one that was never fed goes on from the token before it."""
    positions: list[int] = []
    for position in thread.positions:
        if position is None:
            position = positions[-1] + 1 if positions else _end_of_context(trace, thread)
        positions.append(position)
    return positions


def _end_of_context(trace: Trace, thread: ThreadRecord) -> int:
    if not thread.context:
        return 0
    last = thread.context[-1]
    return _positions(trace, trace.threads[last.thread])[last.end - 1] + 1


def _own(thread: ThreadRecord, end: int, start: int) -> list[range]:
    """Flat ranges of the thread's tokens [0, end) that were fed."""
    return [range(start + i, start + i + 1) for i in range(end) if thread.positions[i] is not None]


def _watched_runs(
    trace: Trace, thread: ThreadRecord
) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """Runs [low, high) of a thread's tokens, fed or not, that see as much of watched threads.

    Gives `(low, high, ((other, its tokens seen), ...))`.
    """
    seen: list[tuple[tuple[int, int], ...]] = []
    for i, step in enumerate(thread.fed_steps):
        before = [s for s in thread.fed_steps[:i] if s is not None]
        index = 0 if step is None else len(before) - bisect_left(before, step)
        seen.append(
            tuple(
                (w.thread, _seen_of(trace.threads[w.thread], step, index - w.lag))
                for w in thread.watches
            )
            if step is not None
            else ()
        )
    fed = [position is not None for position in thread.positions]
    low = 0
    for high in range(1, len(seen) + 1):
        if high == len(seen) or (seen[high], fed[high]) != (seen[low], fed[low]):
            yield low, high, seen[low]
            low = high


def _seen_of(other: ThreadRecord, step: int, last_index: int) -> int:
    """How many of a watched thread's tokens a step's row sees: of that step up to `last_index`."""
    fed = [s for s in other.fed_steps if s is not None]
    before = bisect_left(fed, step)
    now = bisect_left(fed, step + 1) - before
    return before + min(now, max(0, last_index + 1))


def _row_before(trace: Trace, thread: ThreadRecord, starts: Sequence[int]) -> int:
    """The flat index of the row that predicts a thread's first token; -1 if there is none.

    The end of the context; where several contexts end there, as in a join, the last of them that
    was fed in the step whose logits gave the token.
    """
    if not thread.context:
        return -1
    ends = [(span.thread, span.end - 1) for span in thread.context if len(span)]
    step = thread.sampled_steps[0]
    fed = [end for end in ends if trace.threads[end[0]].fed_steps[end[1]] == step]
    owner, index = fed[-1] if fed and step is not None else ends[-1]
    return starts[owner] + index
