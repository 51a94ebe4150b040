"""How the search of a problem is written down, in two ways, and as training examples.

*Parallel*, in Multiverse's tags (arXiv 2506.09991): where two or more pairs could be put together
first, the search forks into one path for each; where there is only one, it goes on without a fork.
That is what the model learns to decide. *Serial* is the same search with the same words, one pair
after another, which stops at the first solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from task import OPERATORS, Problem, apply, first_pairs

from fork_attn.reason.training import Packer, TrainingExample

TAGS = (
    "<Parallel>", "<Goal>", "<Outline>", "</Outline>", "</Goal>", "<Path>", "</Path>",
    "<Conclusion>", "</Conclusion>", "</Parallel>",
)  # fmt: skip
EOS = "<eos>"
ANSWER, HIT, NONE, TRY = "answer", "hit", "none", "try"
MOST_PATHS = 6  # pairs out of four numbers
Encode = Callable[[Sequence[str]], list[int]]


def search_pair(pair: tuple[int, int], rest: Sequence[int], target: int) -> tuple[list[str], bool]:
    """Everything that begins with that pair, up to the first solution.

    Each result is followed by the target and by how they compare, side by side, which is what makes
    it easy to learn: `9 4 3 make 10` begins with `try 9 + 4 = 13 10 high 13 + 3 = 16 10 high`.

    Returns:
        The words of the search, and whether it found a solution.
    """
    words: list[str] = []
    for first in OPERATORS:
        result = apply(first, *pair)
        words += [TRY, *_equation(pair[0], first, pair[1], result), *_verdict(result, target)]
        if result is None:
            continue
        if result == target:
            return words, True
        for c in rest:
            for second in OPERATORS:
                value = apply(second, result, c)
                words += [*_equation(result, second, c, value), *_verdict(value, target)]
                if value == target:
                    return words, True
    return [*words, "miss"], False


def _equation(a: int, sign: str, b: int, result: int | None) -> list[str]:
    return [str(a), sign, str(b), "=", "out" if result is None else str(result)]


def _verdict(result: int | None, target: int) -> list[str]:
    if result is None:
        return []
    return [str(target), HIT if result == target else "low" if result < target else "high"]


def serial_words(problem: Problem) -> list[str]:
    """What the serial model writes."""
    words: list[str] = []
    for pair, rest in first_pairs(problem.numbers):
        search, found = search_pair(pair, rest, problem.target)
        words += search
        if found:
            return [*words, ANSWER, HIT, EOS]
    return [*words, ANSWER, NONE, EOS]


def serial_example(problem: Problem, encode: Encode) -> TrainingExample:
    packer = Packer()
    prompt = packer.add(encode(problem.words), position=0, generated=False)
    packer.add(encode(serial_words(problem)), position=prompt.stop, sees=[prompt])
    return packer.build()


def parallel_example(problem: Problem, encode: Encode) -> TrainingExample:
    """All paths start at one position and do not see each other; the conclusion sees them all.

    `<Path>`, its number and `<Conclusion>` are injected by the engine: they have no loss.
    """
    pairs = first_pairs(problem.numbers)
    if len(pairs) == 1:
        return serial_example(problem, encode)
    packer = Packer()
    prompt = packer.add(encode(problem.words), position=0, generated=False)
    goal = packer.add(encode(goal_words(problem)), position=prompt.stop, sees=[prompt])
    paths, answer = [], NONE
    for number, (pair, rest) in enumerate(pairs, start=1):
        search, found = search_pair(pair, rest, problem.target)
        answer = HIT if found else answer
        words = ["<Path>", f"{number}:", *search, "</Path>"]
        flags = [False, False] + [True] * (len(words) - 2)
        paths.append(
            packer.add(
                encode(words), position=prompt.stop + len(goal), sees=[prompt, goal],
                generated=flags,
            )
        )  # fmt: skip
    words = ["<Conclusion>", ANSWER, answer, "</Conclusion>", "</Parallel>", EOS]
    packer.add(
        encode(words),
        position=prompt.stop + len(goal) + max(map(len, paths)),
        sees=[prompt, goal, *paths],
        generated=[False] + [True] * (len(words) - 1),
    )
    return packer.build()


def goal_words(problem: Problem) -> list[str]:
    """The opening of a fork: one outline for each pair."""
    outlines = [
        word
        for number, ((a, b), _) in enumerate(first_pairs(problem.numbers), start=1)
        for word in ("<Outline>", f"{number}:", str(a), str(b), "</Outline>")
    ]
    return ["<Parallel>", "<Goal>", *outlines, "</Goal>"]


def answer_of(words: Sequence[str]) -> list[str]:
    """What a generated text answers: `none`, or the solution that led to its first `hit`, which is
    one equation, or the one after the last `try` and one that goes on from it.
    """
    words = list(words)
    verdict = words[len(words) - words[::-1].index(ANSWER) :][:1] if ANSWER in words else []
    if verdict != [HIT]:
        return verdict if verdict == [NONE] else []
    hit = words.index(HIT)
    if TRY not in words[:hit]:
        return []
    start = hit - words[:hit][::-1].index(TRY)
    last = words[max(start, hit - 6) : hit - 1]
    return last if hit - 6 <= start else [*words[start : start + 5], *last]
