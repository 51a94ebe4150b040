"""Protocols that sample one prompt several times and keep one: best of n, votes, the first."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Script, together
from fork_attn.reason.thread import Thread
from fork_attn.reason.trace_records import Span

Scorer = Callable[[str], float]


def mean_logprob(thread: Thread) -> float:
    """The mean log-probability of what a thread and those that it comes from sampled."""
    _, logprobs = thread.said()
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


@dataclass(frozen=True)
class _Samples(Protocol):
    """n answers to one prompt, whose first tokens are sampled from the same logits."""

    name: str
    n: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n: expected an int of at least 1, got {self.n!r}")

    def run(self, root: Thread) -> Script:
        labels = [f"sample {i + 1}" for i in range(self.n)]
        samples = yield from root.fork(self.n, labels=labels)
        if not samples:  # a limit refused the fork: one sample is all there is
            yield from root.write()
            return root.answer()
        best = yield from self._choose(samples)
        return best.answer()

    @abstractmethod
    def _choose(self, samples: list[Thread]) -> Script:
        """Drives the samples and returns the one that answers."""

    def cut_off(self, threads: Sequence[Thread]) -> tuple[Span, ...]:
        writing = [thread for thread in threads if not thread.waiting]
        return writing[0].answer() if writing else ()


@dataclass(frozen=True)
class BestOfN(_Samples):
    """The sample with the best score.

    Attributes:
        n: samples.
        scorer: of an answer's text; None takes the mean log-probability.
    """

    name: str = "best_of_n"
    scorer: Scorer | None = None

    def _choose(self, samples: list[Thread]) -> Script:
        yield from together([sample.write() for sample in samples])
        scorer = self.scorer
        if scorer is None:
            return max(samples, key=mean_logprob)
        return max(samples, key=lambda sample: scorer(sample.said()[0]))


@dataclass(frozen=True)
class SelfConsistency(_Samples):
    """A sample with the most frequent answer (arXiv 2203.11171).

    Attributes:
        n: samples.
        answer: finds the answer in a text; None takes the last line that is not empty.
    """

    name: str = "self_consistency"
    answer: Callable[[str], str] | None = None

    def _choose(self, samples: list[Thread]) -> Script:
        yield from together([sample.write() for sample in samples])
        find = self.answer or last_line
        votes = [find(sample.said()[0]) for sample in samples]
        winner, _ = Counter(votes).most_common(1)[0]
        return samples[votes.index(winner)]


@dataclass(frozen=True)
class FirstFinish(_Samples):
    """The sample that ends first; the others stop there."""

    name: str = "first_finish"

    def _choose(self, samples: list[Thread]) -> Script:
        index, _ = yield from together([sample.write() for sample in samples], first=True)
        return samples[index]


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


for _protocol in (BestOfN(), SelfConsistency(), FirstFinish()):
    register(_protocol)
