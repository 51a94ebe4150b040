"""What `fork-attn generate` and `fork-attn trace` do."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fork_attn import hf, reason
from fork_attn.reason import trace_plot, trace_show
from fork_attn.reason_command import LIMITS
from fork_attn.reason_command.live import Live

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(args: argparse.Namespace) -> int:
    """Lets a model think, shows it, and writes what was asked for."""
    if args.list:
        for name, known in reason.protocols().items():
            print(f"{name:<22}{_first_line(known)}".rstrip())
        return 0
    for name in ("prompt", "model", "protocol"):
        if getattr(args, name) is None:
            option = name if name == "prompt" else f"--{name}"
            raise ValueError(f"{option}: expected one, got none; see fork-attn generate --help")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    protocol = _protocol(args.protocol, args.options)
    limits = _limits(args)
    _check_files(args)
    model, tokenizer = _load(args, args.model)
    speculation = _speculation(args)
    sampling = _sampling(args, model)
    hf.attach(model, **({"memory": args.memory} if args.memory else {}))
    events = reason.stream(
        model, tokenizer, prompt, protocol=protocol, sampling=sampling, limits=limits,
        seed=args.seed, speculation=speculation,
    )  # fmt: skip
    shown = not (args.answer or args.no_live)
    with contextlib.closing(events), Live(Console(stderr=True), enabled=shown) as live:
        trace = live.watch(events)
    if args.answer:
        print(trace.text.strip())
    else:
        _print(trace)
    _write(trace, args)
    if args.save:
        trace.save(args.save)
    return 0


def trace(args: argparse.Namespace) -> int:
    """Shows a saved trace, and draws it."""
    if not args.file.is_file():
        raise ValueError(f"file: expected a file, {args.file} is none")
    _check_files(args)
    loaded = reason.Trace.load(args.file)
    if not args.quiet:
        _print(loaded)
    _write(loaded, args)
    return 0


def _print(trace: reason.Trace) -> None:
    console = Console()
    trace_show.show(trace, console)
    console.rule("answer", align="left")
    console.print(trace.text.strip() or "(empty)", markup=False, highlight=False)


def _check_files(args: argparse.Namespace) -> None:
    """Before any work: files that could not be written."""
    if args.plot:
        trace_plot.check_suffix(args.plot)
    for path in (args.plot, args.html, args.timeline, getattr(args, "save", None)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: expected an existing directory, {path.parent} is none")


def _write(trace: reason.Trace, args: argparse.Namespace) -> None:
    from fork_attn.reason import trace_html

    if args.plot:
        trace.plot(args.plot)
    if args.html:
        Path(args.html).write_text(trace_html.html(trace), encoding="utf-8")
    if args.timeline:
        trace.timeline(args.timeline)


def _first_line(protocol: reason.Protocol) -> str:
    """What a protocol's class says of itself; tag protocols name their tags."""
    tags = protocol.tags()
    if tags:
        return "tags " + " ".join(tags[:6]) + (" …" if len(tags) > 6 else "")
    return (type(protocol).__doc__ or "").splitlines()[0]


def _protocol(name: str, options: list[str]) -> reason.Protocol:
    """A protocol by its name, with options `NAME=VALUE` set.

    Raises:
        ValueError: an unknown protocol or option, or no `=`.
    """
    protocol = reason.get_protocol(name)
    fields = {f.name for f in dataclasses.fields(protocol)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in fields - {"name"}:
            known = ", ".join(sorted(fields - {"name"}))
            raise ValueError(f"--set: expected NAME=VALUE with one of {known}, got {option!r}")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return dataclasses.replace(protocol, **values) if values else protocol  # type: ignore[type-var]


def _limits(args: argparse.Namespace) -> reason.Limits:
    given = {name: getattr(args, name) for name in (*LIMITS, "max_seconds")}
    return reason.Limits(**{name: value for name, value in given.items() if value is not None})


def _speculation(args: argparse.Namespace) -> reason.Speculation | None:
    """What drafts tokens, by `--speculate`; None where nothing shall."""
    if args.speculate is None:
        if args.draft_tokens is not None:
            raise ValueError("--draft-tokens: expected --speculate beside it, got none")
        return None
    count = {} if args.draft_tokens is None else {"num_tokens": args.draft_tokens}
    if args.speculate == "lookup":
        return reason.PromptLookup(**count)
    return reason.DraftModel(_load(args, args.speculate, "--speculate")[0], **count)


def _load(
    args: argparse.Namespace, name: str, option: str = "--model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype, None)
    if dtype != "auto" and not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"--dtype: expected auto or a dtype such as bfloat16, got {args.dtype!r}")
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"{option}: expected a model's name or directory, {name} is no directory")
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval().to(args.device), tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def _sampling(args: argparse.Namespace, model: PreTrainedModel) -> GenerationConfig:
    """The model's generation config with what was asked for on the command line."""
    from transformers import GenerationConfig

    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    names = ("top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if args.temperature is not None:
        if args.temperature < 0:
            raise ValueError(f"--temperature: expected at least 0, got {args.temperature}")
        config.do_sample = args.temperature > 0
        config.temperature = args.temperature or None
    elif any(name in given for name in ("top_p", "top_k", "min_p")):
        config.do_sample = True
    for name, value in given.items():
        setattr(config, name, value)
    return config
