"""The game: make a target out of two or three numbers, each used once, with +, - and *.

`-` is the difference, so the order of its operands does not matter. No result may be 0 or above the
limit; such a result is written as `out`. What has no solution is answered with `none`.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

OPERATORS = ("+", "-", "*")
LARGEST = 10  # number given
LIMIT = 50  # result


@dataclass(frozen=True)
class Problem:
    """Numbers in descending order, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def words(self) -> list[str]:
        return [*map(str, self.numbers), "make", str(self.target)]


def apply(sign: str, a: int, b: int) -> int | None:
    """The result, or None where the game forbids it."""
    result = {"+": a + b, "-": abs(a - b), "*": a * b}[sign]
    return result if 1 <= result <= LIMIT else None


def first_pairs(numbers: Sequence[int]) -> list[tuple[tuple[int, int], list[int]]]:
    """Which two numbers can be put together first, and what then is left; equal pairs once."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for i, j in combinations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        pairs.setdefault((numbers[i], numbers[j]), rest)
    return list(pairs.items())


def reachable(numbers: Sequence[int]) -> set[int]:
    """All targets that the numbers can make."""
    if len(numbers) == 1:
        return {numbers[0]}
    found: set[int] = set()
    for (a, b), rest in first_pairs(numbers):
        for sign in OPERATORS:
            if (result := apply(sign, a, b)) is not None:
                found |= reachable([result, *rest])
    return found


def verify(problem: Problem, answer: Sequence[str]) -> bool:
    """Whether `answer`, words such as `3 * 5 = 15 15 + 2 = 17`, or `none`, is right."""
    if list(answer) == ["none"]:
        return problem.target not in reachable(problem.numbers)
    pool = list(problem.numbers)
    if not answer or len(answer) % 5:
        return False
    for i in range(0, len(answer), 5):
        a, sign, b, equals, result = answer[i : i + 5]
        if not (a.isdigit() and b.isdigit() and sign in OPERATORS and equals == "="):
            return False
        for number in (int(a), int(b)):
            if number not in pool:
                return False
            pool.remove(number)
        value = apply(sign, int(a), int(b))
        if value is None or str(value) != result:
            return False
        pool.append(value)
    return pool == [problem.target]


def is_held_out(numbers: Sequence[int]) -> bool:
    """One in five sets of three numbers is kept for evaluation: the model never sees it."""
    weights = (7, 3, 11)
    return len(numbers) == 3 and sum(map(operator.mul, numbers, weights)) % 5 == 0


def draw(rng: random.Random, held_out: bool) -> Problem:
    """A random problem, one in four without a solution; to train on, every other has two numbers:
    short ones teach at little cost to notice that the target is reached.
    """
    while True:
        count = 2 if not held_out and rng.random() < 1 / 2 else 3
        numbers = tuple(sorted((rng.randint(1, LARGEST) for _ in range(count)), reverse=True))
        if is_held_out(numbers) != held_out:
            continue
        can = reachable(numbers)
        solvable = rng.random() < 0.75
        targets = sorted(can if solvable else set(range(1, LIMIT + 1)) - can)
        if targets:
            return Problem(numbers, rng.choice(targets))
