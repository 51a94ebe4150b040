"""Trains a model on written-down searches, with each trace's own mask, positions and labels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from task import Problem, draw
from transformers import LlamaForCausalLM

from fork_attn.reason.training import TrainingExample

POOL = 128  # examples drawn together and batched by length, so that little is padding


@dataclass(frozen=True)
class Budget:
    """The same for every model: so many optimizer steps over about so many tokens each."""

    steps: int
    tokens_per_step: int
    learning_rate: float = 3e-3  # of AdamW: embeddings and norms
    matrix_learning_rate: float = 1e-2  # of Muon: all other weights
    warmup: float = 0.05


def batches(
    make: Callable[[Problem], TrainingExample], budget: Budget, seed: int
) -> Iterator[list[TrainingExample]]:
    """Endless batches of about `tokens_per_step` tokens, in random order."""
    rng = random.Random(seed)
    while True:
        pool = sorted((make(draw(rng, held_out=False)) for _ in range(POOL)), key=len)
        found: list[list[TrainingExample]] = [[]]
        for example in pool:
            if (len(found[-1]) + 1) * len(example) > budget.tokens_per_step:
                found.append([])
            found[-1].append(example)
        rng.shuffle(found)
        yield from (batch for batch in found if batch)


def collate(batch: Sequence[TrainingExample], pad: int) -> dict[str, torch.Tensor]:
    """Tokens and positions (B, S), mask (B, 1, S, S), labels as flat rows and their targets."""
    length = max(map(len, batch))
    input_ids = torch.full((len(batch), length), pad)
    position_ids = torch.zeros(len(batch), length, dtype=torch.int64)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding sees itself
    rows, targets = [], []
    for i, example in enumerate(batch):
        n = len(example)
        input_ids[i, :n] = torch.tensor(example.token_ids)
        position_ids[i, :n] = torch.tensor(example.position_ids)
        mask[i, :n, :n] = example.dense_mask()
        own_rows, own_targets = example.labels()
        rows.append(own_rows + i * length)
        targets.append(own_targets)
    return {
        "input_ids": input_ids, "position_ids": position_ids, "mask": mask[:, None],
        "rows": torch.cat(rows), "targets": torch.cat(targets),
    }  # fmt: skip


def train(
    model: LlamaForCausalLM,
    make: Callable[[Problem], TrainingExample],
    budget: Budget,
    *,
    seed: int,
    on_step: Callable[[int, float, int], None],
) -> list[float]:
    """Trains in place.

    Args:
        model: on its device.
        make: an example of a problem.
        budget: how long.
        seed: of the problems; the same seed gives the same ones whatever `make` is.
        on_step: told of each step: its number, its loss, its tokens.

    Returns:
        The loss of each step.
    """
    device = model.device
    optimizers = _optimizers(model, budget)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale(step, budget))
        for optimizer in optimizers
    ]
    losses = []
    model.train()
    source = batches(make, budget, seed)
    for step in range(budget.steps):
        data = {
            k: v.to(device) for k, v in collate(next(source), model.config.pad_token_id).items()
        }
        hidden = model.model(
            input_ids=data["input_ids"], position_ids=data["position_ids"],
            attention_mask=data["mask"], use_cache=False,
        ).last_hidden_state  # fmt: skip
        logits = model.lm_head(hidden.flatten(0, 1)[data["rows"]])
        loss = torch.nn.functional.cross_entropy(logits, data["targets"])
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        on_step(step, losses[-1], data["input_ids"].numel())
    model.eval()
    return losses


def _optimizers(model: LlamaForCausalLM, budget: Budget) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(
            matrices, lr=budget.matrix_learning_rate, weight_decay=0.0, momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=budget.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]  # fmt: skip


def _scale(step: int, budget: Budget) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = max(1, round(budget.warmup * budget.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, budget.steps - warm)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
