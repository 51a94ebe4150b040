"""The demo on a tiny random model: its protocol, stock baselines, what the user sees."""

from __future__ import annotations

import argparse
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import fork_attn.hf as hf
from fork_attn import demo, reason
from fork_attn.demo import baseline, facts, main
from fork_attn.demo.compare import METHODS, compare
from fork_attn.demo.decode import Ending, Sampling, Written
from fork_attn.demo.progress import Reporter
from fork_attn.demo.session import Session
from fork_attn.demo.threads import Aspects, Script, write_script
from fork_attn.reason import Trace, text_width, trace_picture

ROOT = Path(__file__).resolve().parent.parent
OPENINGS = ("One", "The second", "A third, longer opening", "4")
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; token 0 ends a text."""
    vocab = {"<eos>": 0, **{char: i + 1 for i, char in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def make_script(prompt: str = "Why?") -> Script:
    return write_script(
        make_tokenizer(),
        prompt,
        OPENINGS,
        "\nSo",
        thread_tokens=(12, 20),
        conclusion_tokens=(8, 16),
    )


def make_session(model: LlamaForCausalLM) -> Session:
    return Session("tiny", model, make_tokenizer(), hf.attach(model, num_pages=128))


def make_trace(**options: object) -> Trace:
    model = make_model()
    hf.attach(model, num_pages=128)
    return reason.generate(
        model, make_tokenizer(), "Why?", protocol=Aspects(make_script()), **options
    )


def make_args(out: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--out", str(out), *options])


# --- the protocol


def test_threads_are_those_of_a_plain_forward() -> None:
    greedy = GenerationConfig(do_sample=False)
    trace, model = make_trace(sampling=greedy), make_model()
    threads, end = trace.threads[1:-1], trace.threads[-1]
    assert [thread.label for thread in threads] == list(OPENINGS)
    assert end.parents == (0, 1, 2, 3, 4) and end.text.startswith("\nSo")
    prompt = list(trace.prompt_ids)
    for thread in threads:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *thread.token_ids]])).logits[0]
        expected = logits.argmax(dim=-1).tolist()
        given = thread.injections[0].end
        assert thread.text.startswith(thread.label) and thread.positions[0] == len(prompt)
        assert expected[len(prompt) + given - 1 : -1] == list(thread.token_ids[given:])
        assert 1 <= thread.num_sampled <= 20
    assert end.positions[0] == len(prompt) + max(
        sum(p is not None for p in thread.positions) for thread in threads
    )


@pytest.mark.parametrize(
    ("text", "finish"),
    [
        ("abc", None),
        ("ab. ", None),
        ("abcde.", "sentence"),
        ("a\n", None),
        ("abcd\n", "line"),
        ("a" * 9, "budget"),
    ],
)
def test_ending(text: str, finish: str | None) -> None:
    tokenizer = make_tokenizer()
    ending = Ending(tokenizer, min_tokens=5, max_tokens=9)
    assert ending.finish(tokenizer(text)["input_ids"]) == finish


def test_an_end_token_ends_and_is_not_pending() -> None:
    assert Ending(make_tokenizer(), 5, 9).finish([3, 0]) == "eos"
    assert Written([3], "eos").pending == [] and Written([3, 4], "line").pending == [4]


# --- stock transformers beside it


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 3)], ids=str)
def test_all_methods_write_the_same_tokens(sampling: Sampling) -> None:
    model, script = make_model(), make_script("A prompt that is longer than a few pages. " * 3)
    rounds: list[tuple[int, str]] = []
    stock = baseline.plain_copy(model)
    session = make_session(model)
    root = session.cache.new_branch()
    session.forward({root: script.prompt_ids})
    measured = compare(
        session, stock, root, script, sampling, rounds=2, seconds=1e9,
        on_round=lambda method, number: rounds.append((number, method)),
    )  # fmt: skip
    assert all(m.token_ids == measured[0].token_ids for m in measured)
    assert len(measured[0].token_ids) == len(OPENINGS) and all(measured[0].token_ids)
    assert rounds == [(number, method) for number in range(2) for method in METHODS]
    assert [m.read_again > 0 for m in measured] == [False, True, True]
    assert measured[0].kv_bytes < min(m.kv_bytes for m in measured[1:])
    assert session.cache.stats().branches == 1


def test_a_slow_machine_runs_one_round() -> None:
    model, script = make_model(), make_script()
    stock = baseline.plain_copy(model)
    session = make_session(model)
    root = session.cache.new_branch()
    session.forward({root: script.prompt_ids})
    measured = compare(session, stock, root, script, Sampling(), rounds=9, seconds=0)
    assert [len(m.rounds) for m in measured] == [1, 1, 1]


def test_plain_copy_shares_weights_and_is_not_attached() -> None:
    model = make_model()
    stock = baseline.plain_copy(model)
    hf.attach(model, num_pages=8)
    assert stock.lm_head.weight is model.lm_head.weight
    assert stock.config._attn_implementation != model.config._attn_implementation
    hf.attach(stock, num_pages=8)


# --- the picture


def test_readme_picture_is_drawn_from_its_trace() -> None:
    assets = ROOT / "docs" / "assets"
    trace = Trace.load(assets / "fork.json")
    assert not trace.seconds, "a picture in the repository names no machine's numbers"
    drawn = trace_picture.draw(trace).svg()
    assert (assets / "fork.svg").read_text(encoding="utf-8") == drawn


def test_wrap() -> None:
    text = "some words to wrap " * 20
    lines = text_width.wrap(text, 200, lines=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(text_width.width(line) <= 200 for line in lines)
    assert text_width.wrap("", 200, lines=3) == [""]
    assert text_width.wrap("short", 200, lines=3) == ["short"]


# --- what the user sees


def test_demo_off_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs; nothing moves, and a model that knows no facts fails by its exit status."""
    monkeypatch.setattr(facts, "PREFIX", "Facts:")
    out = io.StringIO()
    reporter = Reporter(Console(file=out, width=100))
    status = main.show(
        reporter, "tiny", make_model(), make_tokenizer(), make_script(), make_args(tmp_path)
    )
    text, status_line = out.getvalue(), "Facts known: 0/3 with the join, 0/3 without."
    assert status == 1
    assert "\x1b" not in text and "\r" not in text
    assert text.rstrip().splitlines()[-1] == status_line
    for words in (*OPENINGS, *METHODS, "All write the same tokens", "one after another"):
        assert words in " ".join(text.split())
    assert set(json.loads((tmp_path / "comparison.json").read_text())) == set(METHODS)
    assert Trace.load(tmp_path / "trace.json").protocol == "aspects"
    ET.parse(tmp_path / "threads.svg")


def test_demo_without_comparison_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    reporter = Reporter(Console(file=out, width=100, force_terminal=True))
    args = make_args(tmp_path, "--no-compare")
    main.show(reporter, "tiny", make_model(), make_tokenizer(), make_script(), args)
    assert "threads write" in out.getvalue()
    assert "stock" not in out.getvalue()
    assert not (tmp_path / "comparison.json").exists()


def test_score_counts_whole_words() -> None:
    answers = facts.Answers(
        facts.FACTS, ("purple", "red bicycle and", "ninety"), ("blue", "", "nine")
    )
    assert answers.score(answers.with_join) == 2 and answers.score(answers.without_join) == 1
    assert not answers.passed


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--temperature", "-1"), "--temperature: expected at least 0, got -1.0"),
        (("--prompt", "  "), "prompt: expected some text, got none"),
    ],
)
def test_bad_options(
    options: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(main, "_load", lambda *_: (make_model(), make_tokenizer()))
    assert demo.run(make_args(tmp_path, *options)) == 2
    assert complaint in capsys.readouterr().err


def test_too_long_a_prompt(tmp_path: Path) -> None:
    script = make_script("x" * 1000)
    reporter = Reporter(Console(file=io.StringIO()))
    with pytest.raises(main.DemoError, match=r"more than the 1024 that tiny can hold"):
        main.show(reporter, "tiny", make_model(), make_tokenizer(), script, make_args(tmp_path))
