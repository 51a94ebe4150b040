"""Branches as one flat training sequence: tokens, positions, who sees whom, which row predicts what.

The mask is given by ranges, one entry a span instead of one a pair of tokens: S spans of a branching
sequence cost O(S) to keep and can be expanded to the dense mask, or handed to a kernel that takes
ranges. A token is predicted by the row of the token before it in its own branch. That row may predict
several tokens, the first of each child, so labels are pairs `(row, target)`: the usual shift by one
would let the last token of one child predict the first token of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` (excluded) of the flat sequence, written one after another.

    Attributes:
        sees: ranges `(low, high)` of earlier tokens that all of them see, ascending and apart. A
            token also sees its own span up to itself.
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
        spans: who sees whom, the sequence from its start to its end.
        predicted_from: per token the index of the token whose row predicts it, the one before it in
            its own branch; -1 for the first.
        generated: per token whether the model wrote it. Only these have a loss: a prompt, a tag that
            an engine injected and tokens copied into a text join have none.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    predicted_from: tuple[int, ...]
    generated: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def dense_mask(self) -> Tensor:
        """(S, S) bool: row i may attend to column j. What attention with an explicit mask takes."""
        mask = torch.zeros(len(self), len(self), dtype=torch.bool)
        for span in self.spans:
            rows = slice(span.start, span.end)
            for low, high in span.sees:
                mask[rows, low:high] = True
            length = span.end - span.start
            mask[rows, rows] = torch.ones(length, length, dtype=torch.bool).tril()
        return mask

    def labels(self) -> tuple[Tensor, Tensor]:
        """(n,) int64 rows and (n,) int64 token ids that these rows predict; a row may occur twice."""
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
        self._spans: list[Span] = []
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
        self._spans.append(Span(start, end, merge_ranges(context)))
        self._predicted_from += [predicted_from, *range(start, end - 1)]
        self._generated += flags
        return range(start, end)

    def build(self) -> TrainingExample:
        return TrainingExample(
            tuple(self._token_ids),
            tuple(self._position_ids),
            tuple(self._spans),
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
