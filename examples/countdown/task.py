"""The game: make a target out of two or three of the numbers given, which differ, each used at most
once, with `+` and `-`.

`-` is the difference, so the order of its operands does not matter. No result may be 0 or above the
limit; such a result is written as `out`. What has no solution is answered with `none`.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

OPERATORS = ("+", "-")
LARGEST = 10  # number given
LIMIT = 30  # result
COUNTS = {2: 20, 3: 25, 4: 55}  # how many numbers a problem has, and how often, in percent
UNSOLVABLE = 0.1


@dataclass(frozen=True)
class Problem:
    """Two to four numbers in descending order, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def words(self) -> list[str]:
        return [*map(str, self.numbers), "make", str(self.target)]

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The problem that is written `9 4 3 make 10`."""
        numbers, target = text.split(" make ")
        return cls(tuple(map(int, numbers.split())), int(target))


def apply(sign: str, a: int, b: int) -> int | None:
    """The result, or None where the game forbids it."""
    result = {"+": a + b, "-": abs(a - b)}[sign]
    return result if 1 <= result <= LIMIT else None


def first_pairs(numbers: Sequence[int]) -> list[tuple[tuple[int, int], list[int]]]:
    """Which two numbers can be put together first, and what then is left."""
    return [(pair, [n for n in numbers if n not in pair]) for pair in combinations(numbers, 2)]


def reachable_from(pair: tuple[int, int], rest: Sequence[int]) -> set[int]:
    """All targets of solutions that begin with that pair."""
    firsts = {apply(sign, *pair) for sign in OPERATORS} - {None}
    seconds = {apply(sign, first, c) for first in firsts for c in rest for sign in OPERATORS}
    return {*firsts, *seconds} - {None}


def reachable(numbers: Sequence[int]) -> set[int]:
    """All targets that the numbers can make."""
    return set().union(*(reachable_from(pair, rest) for pair, rest in first_pairs(numbers)))


def verify(problem: Problem, answer: Sequence[str]) -> bool:
    """Whether `answer`, words such as `9 + 3 = 12 12 - 4 = 8`, or `none`, is right."""
    if list(answer) == ["none"]:
        return problem.target not in reachable(problem.numbers)
    if len(answer) not in (5, 10):
        return False
    pool, result = list(problem.numbers), ""
    for i in range(0, len(answer), 5):
        a, sign, b, equals, value = answer[i : i + 5]
        if not (a.isdigit() and b.isdigit() and sign in OPERATORS and equals == "="):
            return False
        if result:  # what was made first has to be used
            if a != result:
                return False
            pool.append(int(a))
        for number in (int(a), int(b)):
            if number not in pool:
                return False
            pool.remove(number)
        if str(apply(sign, int(a), int(b))) != value:
            return False
        result = value
    return result == str(problem.target)


def is_held_out(numbers: Sequence[int]) -> bool:
    """One in five sets of numbers is kept for evaluation: the model never sees it."""
    weights = (7, 3, 11, 1)
    return sum(map(operator.mul, numbers, weights)) % 5 == 0


def draw(rng: random.Random, held_out: bool) -> Problem:
    """A random problem. Where it has a solution, each pair that can be the first with one is as
    likely to be it: otherwise the first pair would nearly always do, and no search would be long.
    """
    while True:
        (count,) = rng.choices(list(COUNTS), list(COUNTS.values()))
        numbers = tuple(sorted(rng.sample(range(1, LARGEST + 1), count), reverse=True))
        if is_held_out(numbers) != held_out:
            continue
        pairs = first_pairs(numbers)
        if rng.random() < UNSOLVABLE:
            targets = set(range(1, LIMIT + 1)) - reachable(numbers)
        else:
            found = [reachable_from(*pair) for pair in pairs]
            new = [targets.difference(*found[:i]) for i, targets in enumerate(found)]
            targets = rng.choice([targets for targets in new if targets])
        if targets:
            return Problem(numbers, rng.choice(sorted(targets)))
