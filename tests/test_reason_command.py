"""The commands `fork-attn generate` and `fork-attn trace`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from reason_pair import make_model, make_tokenizer
from rich.console import Console

from fork_attn import cli, reason
from fork_attn.reason import Event, ThreadEvent, TokenEvent, Trace
from fork_attn.reason_command import commands
from fork_attn.reason_command.live import Live

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer("multiverse")
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_generate_then_trace(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, page, line = tmp_path / "t.json", tmp_path / "t.html", tmp_path / "line.json"
    common = ("generate", "--model", model_dir, "--protocol", "best_of_n", "What is 7 + 8?")
    options = ("--set", "n=3", "--temperature", 1, "--seed", 5, "--max-thread-tokens", 6)
    assert run(*common, *options, "--save", saved, "--html", page, "--timeline", line) == 0
    out = capsys.readouterr().out
    assert "What is 7 + 8?" in out and "sample 3" in out and "tokens sampled" in out
    trace = Trace.load(saved)
    assert trace.protocol == "best_of_n" and trace.seed == 5
    assert sum(t.kind == "thread" for t in trace.threads) == 3
    assert all(t.num_sampled <= 6 for t in trace.threads)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads(line.read_text(encoding="utf-8"))["traceEvents"]

    assert run("trace", saved, "--plot", tmp_path / "t.svg") == 0
    assert capsys.readouterr().out == out  # what was shown then is shown again
    assert (tmp_path / "t.svg").read_text(encoding="utf-8").startswith("<svg")
    assert run("trace", saved, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_the_answer_alone_is_the_same_for_the_same_seed(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", model_dir, "--protocol", "multiverse", "--max-new-tokens", 12)
    texts = []
    for seed in (1, 1, 2):
        monkeypatch.setattr("sys.stdin", io.StringIO("Why?"))
        assert run("generate", *options, "--temperature", 2, "--seed", seed, "--answer", "-") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_speculation_changes_no_word(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", model_dir, "--protocol", "multiverse", "--max-new-tokens", 30, "Why?")
    texts = []
    for more in ((), ("--speculate", "lookup"), ("--speculate", model_dir, "--draft-tokens", 2)):
        saved = tmp_path / "t.json"
        assert run("generate", *options, *more, "--answer", "--save", saved) == 0
        texts.append(capsys.readouterr().out)
        trace = Trace.load(saved)
    assert texts[0] == texts[1] == texts[2]
    assert trace.speculation["num_tokens"] == 2 and trace.drafted_tokens > 0
    assert run("trace", saved) == 0 and "steps saved" in capsys.readouterr().out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--list") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(reason.protocols())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["Why?"], "--model: expected one, got none"),
        (["--model", "{dir}", "Why?"], "--protocol: expected one, got none"),
        (["--model", "{dir}", "--protocol", "multiverse"], "prompt: expected one, got none"),
        (["--model", "{dir}", "--protocol", "x", "Why?"], "got 'x'"),
        (["--model", "{dir}", "--protocol", "dpts", "--draft-tokens", "2", "?"], "--speculate"),
        (["--model", "{dir}", "--protocol", "dpts", "--speculate", "./no", "?"], "--speculate: ex"),
        (["--model", "./no/such", "--protocol", "multiverse", "Why?"], "no directory"),
        (["--model", "{dir}", "--protocol", "threadweaver", "Why?"], "needs <Outlines>"),
        (["--model", "{dir}", "--protocol", "multiverse", "  "], "prompt: expected some text"),
        (["--model", "{dir}", "--protocol", "best_of_n", "--set", "m=3", "?"], "--set: expected"),
        (["--model", "{dir}", "--protocol", "best_of_n", "--set", "n=x", "?"], "n: expected an"),
        (["--model", "{dir}", "--protocol", "multiverse", "--max-fanout", "0", "?"], "max_fanout"),
        (["--model", "{dir}", "--protocol", "multiverse", "--dtype", "int3", "?"], "--dtype"),
        (["--model", "{dir}", "--protocol", "multiverse", "--temperature", "-1", "?"], "--temper"),
        (
            ["--model", "{dir}", "--protocol", "multiverse", "--plot", "a.gif", "?"],
            "path: expected",
        ),
        (
            ["--model", "{dir}", "--protocol", "multiverse", "--save", "/no/a.json", "?"],
            "directory",
        ),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: list[str], complaint: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.replace("{dir}", str(model_dir)) for argument in arguments]
    assert run("generate", *filled) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("fork-attn generate: ") and complaint in captured.err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(None, "file: expected a file"), ("{}", "expected a 'fork-attn trace'"), ("{", "trace: ")],
)
def test_trace_refuses(
    text: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    assert run("trace", path) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.splitlines()) == 1


def test_interrupt(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Live, events: object) -> Trace:
        next(events)  # type: ignore[call-overload]
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.Live, "watch", interrupted)
    arguments = ("--model", model_dir, "--protocol", "multiverse", "--max-new-tokens", 5, "Why?")
    assert run("generate", *arguments) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0 and "--timeline" in capsys.readouterr().out


def test_the_live_view_shows_who_writes() -> None:
    console = Console(file=io.StringIO(), width=80, height=12, force_terminal=True)
    live = Live(console, enabled=False)
    live.see(TokenEvent(0, 0, "root", 5, -0.1, "Let us see"))
    live.see(ThreadEvent(0, Event(1, "fork", 0, (1, 2))))
    for text in ("one", " two"):
        live.see(TokenEvent(0, 1, "path 1", 5, -0.1, text))
    live.see(TokenEvent(0, 2, "path 2", 5, -0.1, "x" * 500))
    live.see(ThreadEvent(0, Event(2, "prune", 2)))
    with console.capture() as captured:
        console.print(live.frame())
    text = captured.get()
    assert "1 threads write, 4 tokens" in text
    assert "path 1" in text and "one two" in text and "x" * 20 in text
    assert all(len(line) <= 200 for line in text.splitlines())  # colours counted
    live.see(ThreadEvent(0, Event(3, "join", 0, (1,), into=3)))
    assert [live.rows[i].status for i in (0, 1, 2, 3)] == ["joined", "joined", "pruned", "writes"]
    for child in range(4, 60):
        live.see(TokenEvent(0, child, f"t{child}", 5, 0.0, "y"))
    with console.capture() as captured:
        console.print(live.frame())
    assert len(captured.get().splitlines()) <= 12 and "more" in captured.get()
