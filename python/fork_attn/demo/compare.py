"""fork-attn and stock transformers side by side: the same threads, in turn, several times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from fork_attn import Branch
from fork_attn.demo import baseline
from fork_attn.demo.decode import Sampling
from fork_attn.demo.session import Session
from fork_attn.demo.threads import Round, Script, fork_round

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 3
SECONDS = 25.0
FORK = "fork-attn"
ONE_BY_ONE = "stock, one by one"
IN_ONE_BATCH = "stock, batched"
METHODS = (FORK, ONE_BY_ONE, IN_ONE_BATCH)


@dataclass(frozen=True)
class Measured:
    """One method's rounds; every time is the median of them."""

    method: str
    rounds: tuple[Round, ...]

    @property
    def tokens_per_second(self) -> float:
        return median(r.tokens_per_second for r in self.rounds)

    @property
    def fork_seconds(self) -> float:
        return median(r.fork_seconds for r in self.rounds)

    @property
    def resume_seconds(self) -> float:
        return median(r.resume_seconds for r in self.rounds)

    @property
    def kv_bytes(self) -> int:
        return max(r.kv_bytes for r in self.rounds)

    @property
    def read_again(self) -> int:
        return self.rounds[0].read_again

    @property
    def token_ids(self) -> list[list[int]]:
        """What each thread generated; the same in every round."""
        return [written.token_ids for written in self.rounds[0].written]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_second": [r.tokens_per_second for r in self.rounds],
            "fork_seconds": [r.fork_seconds for r in self.rounds],
            "resume_seconds": [r.resume_seconds for r in self.rounds],
            "kv_bytes": self.kv_bytes,
            "tokens_read_again": self.read_again,
        }


def compare(
    session: Session,
    stock: PreTrainedModel,
    root: Branch,
    script: Script,
    sampling: Sampling,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    on_round: Callable[[str, int], None] | None = None,
) -> list[Measured]:
    """Runs every method up to `rounds` times, in turn: what else the machine does slows all.

    Args:
        session: the attached model.
        stock: the same weights without fork-attn.
        root: a branch of the session that holds the script's prompt.
        script, sampling: the work.
        rounds: most repetitions.
        seconds: no round begins after this long; the first always runs.
        on_round: told of each method before it runs, with the round's number.

    Returns:
        One per method, in the order of `METHODS`.
    """
    prompt = baseline.read_prompt(stock, script)
    results: dict[str, list[Round]] = {method: [] for method in METHODS}
    began = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - began > seconds:
            break
        for method in METHODS:
            if on_round is not None:
                on_round(method, number)
            if method == FORK:
                result = _fork_attn(session, root, script, sampling)
            elif method == ONE_BY_ONE:
                result = baseline.one_by_one(stock, prompt, script, sampling)
            else:
                result = baseline.in_one_batch(stock, prompt, script, sampling)
            results[method].append(result)
    return [Measured(method, tuple(results[method])) for method in METHODS]


def _fork_attn(session: Session, root: Branch, script: Script, sampling: Sampling) -> Round:
    result, parent, _ = fork_round(session, root, script, sampling)
    session.cache.free([parent])
    return result
