"""Running branches through an attached model, and joining them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fork_attn import checks
from fork_attn.branch import Branch
from fork_attn.errors import StalePlan, Unsupported
from fork_attn.hf._link import Link, link_of, model_of
from fork_attn.hf._pass import FORK_STEP, ForwardPass, placeholder_mask
from fork_attn.hf.fork_cache import ForkCache
from fork_attn.step import Step


def forward(
    model: PreTrainedModel,
    tokens: Mapping[Branch, Sequence[int]],
    *,
    step: Step | None = None,
    logits: Literal["last", "all"] | Sequence[int] = "last",
) -> Tensor:
    """Feeds tokens to branches in one ragged pass, and gives the logits that follow them.

    Runs without gradients. The branches may take different numbers of tokens; the pass is one batch
    row of all tokens together. On an error nothing is stored.

    Args:
        model: an attached model with a language-modelling head.
        tokens: for each branch at least one token id.
        step: an open step over these branches, in this order and with as many tokens each, such as
            one with a `Draft`. It is used and left open. None opens one and commits it.
        logits: "last" for each branch's last token, "all" for every token, or the indices of the
            tokens, counted over all branches.

    Returns:
        (n, vocab) for n branches, (T, vocab) for T tokens, in the order of tokens, or a row for
        each index.

    Raises:
        Unsupported: the model is not attached, or has no head.
        ValueError: a token id is out of range, a branch has no tokens, or step does not fit.
        OutOfPages, StaleBranch, ForeignBranch, StepOpen: from opening the step.
    """
    link = link_of(model)
    if isinstance(logits, str) and logits not in ("last", "all"):
        raise ValueError(f'logits: expected "last", "all" or indices, got {logits!r}')
    if model.get_output_embeddings() is None:
        raise Unsupported(f"model: {link.model_name} has no language-modelling head")
    ids = {branch: _token_ids(i, t, link) for i, (branch, t) in enumerate(tokens.items())}
    if not isinstance(logits, str):
        high = sum(map(len, ids.values())) - 1
        logits = [checks.integer("logits", row, low=0, high=high) for row in logits]
    if step is not None:
        _check_step(step, ids, link)
        return _run(model, link, ids, step, logits)
    with link.cache.step({branch: len(row) for branch, row in ids.items()}) as own:
        return _run(model, link, ids, own, logits)


def join(
    parent: Branch,
    children: Sequence[Branch],
    *,
    pending: Mapping[Branch, int] | None = None,
    **kwargs: Any,
) -> None:
    """Joins children into their parent, first feeding each child the token it sampled last.

    A sampled token is in the cache only once the model has been fed it; without that a join would
    lose each child's last token. All or nothing: if the join fails, the fed tokens are taken back.

    Args:
        parent: a branch of an attached model's cache.
        children: the branches to join, see `Branch.join`.
        pending: for a child its last token id; children without one are joined as they are.
        **kwargs: for `Branch.join`.

    Raises:
        ValueError: pending names a branch that is no child.
        Unsupported: there are pending tokens and the cache's model is gone.
    """
    pending = dict(pending or {})
    if any(branch not in children for branch in pending):
        raise ValueError("pending: expected children only, got another branch")
    if not pending:
        parent.join(children, **kwargs)
        return
    before = {branch: (branch.length, branch.position) for branch in pending}
    forward(model_of(parent.cache), {branch: [token] for branch, token in pending.items()})
    try:
        parent.join(children, **kwargs)
    except BaseException:
        for branch, (length, position) in before.items():
            branch._take_back(length, position)
        raise


def _run(
    model: PreTrainedModel,
    link: Link,
    ids: Mapping[Branch, list[int]],
    step: Step,
    logits: str | Sequence[int],
) -> Tensor:
    device, sent = model.device, link.cache._storage.sent
    flat = [token for row in ids.values() for token in row]
    forward_pass = ForwardPass(link, step)
    fork_cache = ForkCache(link.cache)
    fork_cache._activate(forward_pass)
    rows: Tensor | None = None
    if logits == "last":
        rows = step.last_indices.to(device)
    elif logits != "all":
        rows = sent(torch.tensor(logits, dtype=torch.int64))
    kept = {} if rows is None or not link.keeps_logits else {"logits_to_keep": rows}
    with torch.no_grad():
        output = model(
            input_ids=sent(torch.tensor([flat])),
            position_ids=step.position_ids[None].to(device),
            attention_mask=placeholder_mask(device),
            past_key_values=fork_cache,
            use_cache=True,
            return_dict=True,
            **{FORK_STEP: forward_pass},
            **kept,
        )
    forward_pass.check_complete()
    got: Tensor = output.logits[0]
    return got if rows is None or kept else got[rows]


def _token_ids(index: int, tokens: Sequence[int], link: Link) -> list[int]:
    ids = [operator.index(token) for token in tokens]
    if not ids:
        raise ValueError(f"tokens: branch {index} got no tokens, expected at least one")
    for token in ids:
        if not 0 <= token < link.vocab_size:
            raise ValueError(
                f"tokens: branch {index} got token id {token}, expected 0 to {link.vocab_size - 1}"
            )
    return ids


def _check_step(step: Step, ids: Mapping[Branch, list[int]], link: Link) -> None:
    if step.state != "open":
        raise StalePlan(f"step: expected an open step, got one that is {step.state}")
    if link.cache._open_step is not step:
        raise StalePlan(f"step: it is not a step of {link.model_name}'s cache")
    if step.branches != tuple(ids):
        raise ValueError("step: expected the branches of tokens, in the same order, got others")
    counts = step._counts()
    got = [len(row) for row in ids.values()]
    if counts != got:
        raise ValueError(f"tokens: expected {counts} tokens as in the step, got {got}")
