"""Trains two small models from scratch, one that forks and one that does not, and compares them.

    python examples/countdown/run.py            # about 10 minutes on one idle core
    python examples/countdown/run.py --quick    # a minute: shows that it runs, learns nothing much

Writes results.json, results.md, results.svg and the trace of one problem (trace.json, trace.svg).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import evaluation
import picture
import torch
from machine import machine
from model import make_model, make_tokenizer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from traces import parallel_example, serial_example
from training import Budget, train
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fork_attn import hf
from fork_attn.reason import trace_picture

MAKERS = {"parallel": parallel_example, "serial": serial_example}
BUDGETS = {
    "cpu": Budget(steps=700, tokens_per_step=1024),
    "cuda": Budget(
        steps=8000, tokens_per_step=16384, learning_rate=1e-3, matrix_learning_rate=5e-3
    ),
    "quick": Budget(steps=20, tokens_per_step=1024),
}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    console = Console()
    tokenizer = make_tokenizer()
    budget = BUDGETS["quick" if args.quick else args.device]
    budget = replace(budget, steps=args.steps or budget.steps)
    models, training = {}, {}
    for name in [args.only] if args.only else list(MAKERS):
        models[name], training[name] = get_model(name, args, budget, tokenizer, console)
    if args.only:
        return
    for model in models.values():
        hf.attach(model, num_pages=4096)
    problems = evaluation.held_out(args.problems, args.seed)
    timed = min(args.timed, len(problems))
    with progress(console) as bar:
        task = bar.add_task("solving held-out problems", total=len(models) + timed)
        found = evaluation.evaluate(models, tokenizer, problems, timed, lambda: bar.advance(task))
    write(args, found, training, asdict(budget))
    (trace,) = evaluation.solve(models["parallel"], tokenizer, problems[:1])
    trace.save(args.out / "trace.json")
    (args.out / "trace.svg").write_text(trace_picture.draw(trace).svg(), encoding="utf-8")
    print(picture.table(found))
    console.print(f"Written to {args.out}", markup=False, highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute: 20 steps, 2 problems")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a larger one"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of training (default: 700)")
    parser.add_argument("--problems", type=int, metavar="N", help="to evaluate (default: 300)")
    parser.add_argument(
        "--timed",
        type=int,
        default=40,
        metavar="N",
        help="of them also alone, timed (default: 40)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and problems (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("countdown"), metavar="DIR",
        help="where results go (default: countdown)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, metavar="DIR",
        help="keeps the trained models there; those already there are not trained again",
    )  # fmt: skip
    parser.add_argument("--only", choices=tuple(MAKERS), help="train this model, then stop")
    args = parser.parse_args()
    if args.problems is None:
        args.problems = 2 if args.quick else 300
    for name in ("problems", "timed"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda is not available here")
    if args.only and not args.models:
        parser.error("--only: expected --models as well, to keep what is trained")
    return args


def get_model(
    name: str, args: argparse.Namespace, budget: Budget, tokenizer: PreTrainedTokenizerFast,
    console: Console,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:  # fmt: skip
    """The trained model, and how it was trained."""
    folder = args.models / name if args.models else None
    if folder and (folder / "training.json").is_file():
        console.print(f"{name}: read from {folder}", markup=False, highlight=False)
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return LlamaForCausalLM.from_pretrained(folder).eval().to(args.device), facts
    model = make_model(
        args.device, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, args.seed
    ).to(args.device)
    tokens, began, cpu = 0, time.perf_counter(), time.process_time()
    with progress(console) as bar:
        task = bar.add_task(f"training the {name} model", total=budget.steps)

        def on_step(step: int, loss: float, count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.update(task, advance=1, description=f"training the {name} model, loss {loss:.3f}")
            if not console.is_terminal and step % 100 == 99:
                console.print(f"{name}: step {step + 1}, loss {loss:.4f}", highlight=False)

        losses = train(
            model, lambda problem: MAKERS[name](problem, tokenizer.convert_tokens_to_ids), budget,
            seed=args.seed, on_step=on_step,
        )  # fmt: skip
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": budget.steps,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "loss": [*losses[:: max(1, len(losses) // 50)], losses[-1]],
    }
    if folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return model, facts


def write(
    args: argparse.Namespace, found: dict[str, list[evaluation.Outcome]],
    training: dict[str, Any], budget: dict[str, Any],
) -> None:  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    command = "python examples/countdown/run.py " + shlex.join(sys.argv[1:])
    results = {
        "command": command.strip(),
        "machine": (place := machine(args.device)),
        "budget": {**budget, "sampled_tokens": evaluation.TOKEN_BUDGET},
        "training": training,
        "summary": {name: evaluation.summary(outcomes) for name, outcomes in found.items()},
        "baselines": evaluation.baselines(next(iter(found.values()))),
        "outcomes": evaluation.as_json(found),
    }
    (args.out / "results.json").write_text(_one_line_each(results), encoding="utf-8")
    table = picture.table(found)
    software = f"torch {place['torch']}, commit {place['commit']}, {place['date'][:16]}"
    ran = f"`{command.strip()}` on {place['processor']}, {place['threads']} thread(s), {software}."
    text = f"{ran}\n\n{table}"
    (args.out / "results.md").write_text(text, encoding="utf-8")
    scene = picture.draw(found)
    (args.out / "results.svg").write_text(scene.svg(), encoding="utf-8")


def _one_line_each(results: dict[str, Any]) -> str:
    """JSON with a line for each problem's outcome."""
    outcomes = results.pop("outcomes")
    text = json.dumps(results, indent=1).removesuffix("\n}")
    tables = [
        f'  "{name}": [\n   ' + ",\n   ".join(map(json.dumps, rows)) + "\n  ]"
        for name, rows in outcomes.items()
    ]
    return text + ',\n "outcomes": {\n' + ",\n".join(tables) + "\n }\n}\n"


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip


if __name__ == "__main__":
    main()
