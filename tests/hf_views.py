"""An attached model beside the same model over explicit views: every row attends, in float64, to a
list of keys of its own, each turned to the place where the row sees it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AttentionInterface

from fork_attn import Branch, ForkedKVCache, Rope, hf
from fork_attn.reference import attention, rerotate
from fork_attn.reference_cache import DeepCopyCache, Rows, Token

_NAME = "explicit_views"
_current: _Pass | None = None


class _Pass:
    """What the rows of one forward see: identities, and positions in the row's own view."""

    def __init__(self, views: ViewPair, rows: Mapping[int, Rows]) -> None:
        self.new: list[tuple[int, int]] = []  # identity and written position of each row
        self.turns: list[int] = []  # how much each query moves on
        self.seen: list[list[tuple[int, int]]] = []
        self.stored = views.stored
        self.ropes = views.oracle.ropes
        for branch, new in rows.items():
            placed = views.oracle.place(branch, new)
            for row, token in enumerate(placed):
                seen, total = views.oracle.view(branch, rows, row)
                own = [(t.identity, t.position + total) for t in placed[: row + 1]]
                self.new.append((token.identity, token.position))
                self.turns.append(total)
                self.seen.append([*((t.identity, t.position) for t in seen), *own])


def _explicit_views(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert _current is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    stored, rope = _current.stored.setdefault(layer, {}), _current.ropes[layer]
    for row, (identity, written) in enumerate(_current.new):
        stored[identity] = (key[0, :, row], value[0, :, row], written)
    outs = []
    for row, seen in enumerate(_current.seen):
        at = _current.new[row][1] + _current.turns[row]
        seen = [(i, p) for i, p in seen if sliding_window is None or at - p < sliding_window]
        keys = [rerotate(stored[i][0], p - stored[i][2], rope, torch.float64) for i, p in seen]
        q = rerotate(query[0, :, row], _current.turns[row], rope, torch.float64)
        values = torch.stack([stored[i][1] for i, _ in seen])
        mask = torch.ones(1, len(seen), dtype=torch.bool)
        options = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
        out, _ = attention(
            q[None], torch.stack(keys), values, mask, softmax_scale=scaling, **options
        )
        outs.append(out[0].to(query.dtype))
    return torch.stack(outs)[None], None


class ViewPair:
    """Runs both; `max_error` is the largest difference of any logit so far.

    Args:
        model: not attached yet.
        ropes: of its layers, written down by hand.
        **options: of `hf.attach`.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, ropes: Sequence[Rope], **options: Any
    ) -> None:
        AttentionInterface.register(_NAME, _explicit_views)
        self.stock = copy.deepcopy(model)
        self.stock.set_attn_implementation(_NAME)
        self.model = model
        self.cache: ForkedKVCache = hf.attach(model, **options)
        self.oracle = DeepCopyCache(ropes)
        self.ids: dict[Branch, int] = {}
        self.stored: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor, int]]] = {}
        self.max_error = 0.0
        self._next = 0

    def new_branch(self) -> Branch:
        branch = self.cache.new_branch()
        self.ids[branch] = self.oracle.new_branch()
        return branch

    def fork(self, branch: Branch, n: int) -> list[Branch]:
        children = branch.fork(n)
        self.ids.update(zip(children, self.oracle.fork(self.ids[branch], n), strict=True))
        return children

    def watch(self, branch: Branch, other: Branch, **options: Any) -> None:
        branch.watch(other, **options)
        self.oracle.watch(self.ids[branch], self.ids[other], **options)

    def watch_each_other(self, branches: Sequence[Branch], **options: Any) -> None:
        for branch in branches:
            for other in branches:
                if other is not branch:
                    self.watch(branch, other, **options)

    def join(self, parent: Branch, children: Sequence[Branch], **options: Any) -> None:
        hf.join(parent, children, **options)
        # What a copy stores is what the reference computes anyway.
        rebase = bool(options.pop("rebase", False))
        self.oracle.join(
            self.ids[parent], [self.ids[c] for c in children], rebase=rebase, **options
        )

    def free(self, branch: Branch) -> None:
        branch.free()
        self.oracle.free([self.ids[branch]])

    def excise(self, branch: Branch, start: int, end: int) -> None:
        branch.excise(start, end, rebase=True)
        self.oracle.excise(self.ids[branch], start, end, True)

    def feed(self, tokens: Mapping[Branch, Sequence[int]]) -> None:
        """One ragged forward of both."""
        global _current
        got = hf.forward(self.model, tokens, logits="all")
        rows = {}
        for branch, ids in tokens.items():
            rows[self.ids[branch]] = Rows([Token(self._next + i, 0) for i in range(len(ids))])
            self._next += len(ids)
        positions = [t.position for i, new in rows.items() for t in self.oracle.place(i, new)]
        _current = _Pass(self, rows)
        with torch.no_grad():
            want = self.stock(
                input_ids=torch.tensor([[t for ids in tokens.values() for t in ids]]),
                position_ids=torch.tensor([positions]),
                attention_mask=torch.zeros((1, 1, 1, 1), dtype=torch.bool),
                use_cache=False,
            ).logits[0]
        _current = None
        self.oracle.step(rows)
        assert got.isfinite().all()
        self.max_error = max(self.max_error, float((got - want).abs().max()))
