"""The countdown example: its game, its written-down searches, and that it runs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COUNTDOWN = ROOT / "examples" / "countdown"
sys.path.insert(0, str(COUNTDOWN))

import task  # noqa: E402
import traces  # noqa: E402
from model import make_model, make_tokenizer  # noqa: E402
from reason_pair import Forced, run_forced  # noqa: E402


def problems(count: int, held_out: bool = False) -> list[task.Problem]:
    rng = random.Random(torch.initial_seed())
    return [task.draw(rng, held_out) for _ in range(count)]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("9 + 4 = 13 13 - 3 = 10", True),
        ("9 - 4 = 5 5 + 5 = 10", True),  # one number is left over
        ("3 + 7 = 10", False),  # 7 is not there
        ("13 - 3 = 10 9 + 4 = 13", False),  # nor is 13 yet
        ("9 + 4 = 13 13 - 3 = 11", False),
        ("9 + 4 = 13", False),
        ("5 + 5 = 10", False),  # 5 is there once
        ("9 - 4 = 5 5 + 4 = 9", False),  # 4 is used up
        ("9 - 3 = 6 5 + 4 = 9", False),  # 6 was made for nothing
        ("9 + 4 = 13 13 - 3", False),
        ("none", False),
        ("", False),
        ("make = make = make", False),
    ],
)
def test_verify(answer: str, right: bool) -> None:
    assert task.verify(task.Problem((9, 5, 4, 3), 10), answer.split()) is right


def test_what_cannot_be_made_is_none() -> None:
    assert task.verify(task.Problem((1, 1), 7), ["none"])
    assert not task.verify(task.Problem((5, 2), 7), ["none"])
    assert task.reachable((2, 1)) == {1, 3} and task.reachable((1, 1)) == {2}
    assert task.reachable((5, 2, 1)) == {1, 2, 3, 4, 6, 7, 8}


def test_problems_are_drawn_as_said() -> None:
    drawn = problems(2000, held_out=True)
    assert {len(p.numbers) for p in drawn} == set(task.COUNTS)
    assert all(task.Problem.parse(" ".join(p.words)) == p for p in drawn)
    unsolvable = sum(p.target not in task.reachable(p.numbers) for p in drawn)
    assert 0.07 < unsolvable / len(drawn) < 0.13


def test_baselines() -> None:
    import evaluation

    texts = ["1 1 make 7", "5 2 make 7", "2 1 make 1", "5 2 1 make 8"]
    outcomes = [evaluation.Outcome(text, False, True, 0, 1, 1, 1) for text in texts]
    found = evaluation.baselines(outcomes)
    assert found["always `none`"] == 1 / 4
    # 5+2, 5-2, 5+1, 5-1, 2+1, 2-1 and each with what is left: 18 tries, of which 3 give 8
    assert found["a random try"] == pytest.approx((0 + 1 / 2 + 1 / 2 + 3 / 18) / 4)
    low, high = evaluation.interval(0.8, 300)
    assert (round(low, 3), round(high, 3)) == (0.751, 0.841)
    assert evaluation.interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_written_searches_end_in_right_answers() -> None:
    tokenizer = make_tokenizer()
    encode = tokenizer.convert_tokens_to_ids
    for problem in problems(200):
        assert task.verify(problem, traces.answer_of(traces.serial_words(problem)))
        example = traces.parallel_example(problem, encode)
        words = tokenizer.convert_ids_to_tokens(example.token_ids)
        assert task.verify(problem, traces.answer_of(words))
        assert tokenizer.unk_token_id not in example.token_ids
        pairs = len(task.first_pairs(problem.numbers))
        assert words.count("<Path>") == (pairs if pairs > 1 else 0)


def test_a_written_search() -> None:
    words, found = traces.search_pair((9, 4), [3], 10)
    assert " ".join(words) == "try 9 + 4 = 13 10 high 13 + 3 = 16 10 high 13 - 3 = 10 10 hit"
    assert found
    words, found = traces.search_pair((4, 4), [], 9)
    assert " ".join(words) == "try 4 + 4 = 8 9 low try 4 - 4 = out miss"
    assert not found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("try 9 + 4 = 13 13 hit answer hit <eos>", "9 + 4 = 13"),
        (
            "try 9 + 4 = 13 5 high 13 + 3 = 16 5 high try 9 - 4 = 5 5 hit answer hit </Conclusion>",
            "9 - 4 = 5",
        ),
        ("try 9 + 4 = 13 10 high 13 - 3 = 10 10 hit </Path> answer hit", "9 + 4 = 13 13 - 3 = 10"),
        ("try 9 + 4 = 13 10 high miss answer none", "none"),
        ("hit answer hit", ""),
        ("try hit answer hit", ""),
        ("answer", ""),
        ("try 9 + 4 = 13 13 hit", ""),
    ],
)
def test_the_answer_is_read_off_the_search(text: str, answer: str) -> None:
    assert " ".join(traces.answer_of(text.split())) == answer


def test_held_out_numbers_are_never_trained_on() -> None:
    held = {problem.numbers for problem in problems(300, held_out=True)}
    assert held and not held & {problem.numbers for problem in problems(300)}


def test_training_sees_what_generation_will_do() -> None:
    """A search written down for training is, token for token, position for position and mask for
    mask, the trace of a generation in Multiverse's protocol."""
    tokenizer = make_tokenizer()
    encode = tokenizer.convert_tokens_to_ids
    problem = next(p for p in problems(100) if len(task.first_pairs(p.numbers)) == 6)
    example = traces.parallel_example(problem, encode)
    words = tokenizer.convert_ids_to_tokens(example.token_ids)
    starts = [i for i, word in enumerate(words) if word == "<Path>"]
    ends = [i + 1 for i, word in enumerate(words) if word == "</Path>"]
    goal = words[len(problem.words) : starts[0]]
    script = {((1, i),): encode(words[a + 2 : b]) for i, (a, b) in enumerate(zip(starts, ends))}  # noqa: B905
    script[()] = encode(goal) + encode(words[ends[-1] + 1 :])
    model = make_model("cpu", len(tokenizer), 0, tokenizer.eos_token_id, seed=0).eval()
    forced = Forced(script)
    (trace,) = run_forced(model, tokenizer, " ".join(problem.words), "multiverse", forced)
    assert forced.used_up
    recorded = trace.training_example()
    assert recorded.token_ids == example.token_ids
    assert recorded.position_ids == example.position_ids
    assert recorded.generated == example.generated
    assert recorded.predicted_from == example.predicted_from
    assert torch.equal(recorded.dense_mask(), example.dense_mask())
    assert trace.critical_path_tokens < trace.total_tokens


def test_it_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(COUNTDOWN / "run.py"), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| parallel |" in done.stdout and "| serial |" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert {len(rows) for rows in results["outcomes"].values()} == {2}
    assert (tmp_path / "results.svg").is_file() and (tmp_path / "trace.svg").is_file()


def test_committed_picture_and_table_are_those_of_the_committed_results() -> None:
    import evaluation
    import picture

    folder = COUNTDOWN / "results"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = {
        name: [evaluation.Outcome(**row) for row in rows]
        for name, rows in results["outcomes"].items()
    }
    drawn = picture.draw(found, picture.TITLE).svg()
    assert (folder / "results.svg").read_text(encoding="utf-8") == drawn
    table = picture.table(found)
    assert (folder / "results.md").read_text(encoding="utf-8").endswith(table)
    assert table in (COUNTDOWN / "README.md").read_text(encoding="utf-8")
