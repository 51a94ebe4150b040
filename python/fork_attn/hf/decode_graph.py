"""One token for each of many branches as one CUDA graph launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fork_attn import checks
from fork_attn.branch import Branch
from fork_attn.devices import current
from fork_attn.errors import PlanCapacityExceeded, Unsupported
from fork_attn.hf._link import Link, link_of
from fork_attn.hf._pass import FORK_STEP, ForwardPass, placeholder_mask
from fork_attn.hf.fork_cache import ForkCache
from fork_attn.plan_buffers import PlanBuffers


class _BufferPass(ForwardPass):
    """A forward over whatever step was last written to the buffers."""

    def __init__(self, link: Link, buffers: PlanBuffers) -> None:
        super().__init__(link, None)
        self._buffers = buffers

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        batch, num_heads, seq, _ = query.shape
        self._attended.add(layer_idx)
        q, k, v = (self._select(x) for x in (query, key, value))
        if self.link.cast:
            q, k, v = (x.to(self.link.kv_dtype) for x in (q, k, v))
        out = self._buffers.attend(layer_idx, q, k, v, **options)
        return out.to(query.dtype).view(batch, seq, num_heads, out.shape[-1])


class DecodeGraph:
    """A decode step of an attached model, captured once for each of a few widths.

    A call takes one token for each of any live branches: it reserves slots, writes the step to
    buffers at fixed addresses (`PlanBuffers`), and replays the graph of the least width that holds
    the branches. Forks, joins, crops and frees between calls need no new capture. A width is
    captured at its first use, and once more at the first with branches that see tokens at shifted
    positions (rebased joins, watches).

    Args:
        model: an attached model with a language-modelling head.
        max_width: branches of a call, at most.
        capture: False runs the same passes over the same buffers without a graph, on any device:
            for tests of the bookkeeping, not for speed.
        max_plan_bytes, max_partial_rows, max_rotations: see `PlanBuffers`.

    Attributes:
        widths: those that may be captured: powers of two up to 64, then multiples of 64.
        buffers: the static inputs.

    Raises:
        Unsupported: the model is not attached, has no head, or `capture` without a CUDA device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_width: int,
        capture: bool = True,
        max_plan_bytes: int | None = None,
        max_partial_rows: int | None = None,
        max_rotations: int | None = None,
    ) -> None:
        self._link = link_of(model)
        self._model = model
        if model.get_output_embeddings() is None:
            raise Unsupported(f"model: {self._link.model_name} has no language-modelling head")
        if capture and model.device.type != "cuda":
            raise Unsupported(
                f"DecodeGraph: a CUDA graph needs a model on a CUDA device, got {model.device}; "
                "capture=False runs without a graph"
            )
        self._capture = capture
        self.widths = _widths(checks.integer("max_width", max_width, low=1, high=2**16))
        self.buffers = PlanBuffers(
            self._link.cache,
            max_tokens=self.widths[-1],
            max_plan_bytes=max_plan_bytes,
            max_partial_rows=max_partial_rows,
            max_rotations=max_rotations,
        )
        self._mask = placeholder_mask(model.device)
        self._runs: dict[tuple[int, bool], Callable[[], Tensor]] = {}  # by width and shifts
        # What the graphs share: they never run at once.
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, tokens: Mapping[Branch, int]) -> Tensor:
        """Feeds one token to each branch. On an error nothing is stored.

        Args:
            tokens: a token id for each branch.

        Returns:
            (n, vocab), in the order of `tokens`; the next call overwrites it.

        Raises:
            PlanCapacityExceeded: more branches than `max_width`, or a plan, or its rotated query
                rows, larger than the buffers.
            ValueError: a token id is out of range.
            OutOfPages, StaleBranch, ForeignBranch, StepOpen: from opening the step.
        """
        link = self._link
        ids = [
            checks.integer(f"tokens: branch {i}", token, low=0, high=link.vocab_size - 1)
            for i, token in enumerate(tokens.values())
        ]
        if len(ids) > self.widths[-1]:
            raise PlanCapacityExceeded(
                f"tokens: expected at most {self.widths[-1]} branches, got {len(ids)}"
            )
        with link.cache.step(dict.fromkeys(tokens, 1)) as step:
            self.buffers.update(step, ids)
            width = next(w for w in self.widths if w >= len(ids))
            key = width, self.buffers.shifted
            if key not in self._runs:
                self._runs[key] = self._prepare(width)
            logits = self._runs[key]()
        return logits[: len(ids)]

    def _prepare(self, width: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return self._forward(width)

        if not self._capture:
            return run
        with current(self._model.device):
            return self._captured(run)

    def _captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        device = self._model.device
        # Twice beside the graph: kernels compile, layers take their memory, libraries their own.
        # The step's K and V are stored again by the replay, to the same slots.
        side = self._stream = self._stream or torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Torch's own stream for captures belongs to the device of the first capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            logits = run()
        self._pool = graph.pool()

        def replay() -> Tensor:
            with current(device):
                graph.replay()
            return logits

        return replay

    def _forward(self, width: int) -> Tensor:
        forward_pass = _BufferPass(self._link, self.buffers)
        fork_cache = ForkCache(self._link.cache)
        fork_cache._activate(forward_pass)
        with torch.no_grad():
            output = self._model(
                input_ids=self.buffers.input_ids[None, :width],
                position_ids=self.buffers.position_ids[None, :width],
                attention_mask=self._mask,
                past_key_values=fork_cache,
                use_cache=True,
                return_dict=True,
                **{FORK_STEP: forward_pass},
            )
        forward_pass.check_complete()
        logits: Tensor = output.logits[0]
        return logits


def _widths(most: int) -> tuple[int, ...]:
    small = [1 << i for i in range(7) if 1 << i < min(most, 64)]
    large = list(range(64, most, 64))
    return (*dict.fromkeys([*small, *large]), most)
