"""Steps and time that drafts save, on a text that repeats itself and on one that does not.

python benchmarks/speculation.py [--repeats 3] [--tokens 96]
Runs SmolLM2-135M-Instruct on the CPU; each way is timed in turn, and times are ratios to plain
decoding in the same round.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import GenerationConfig

from fork_attn import hf, reason
from fork_attn.demo import weights
from fork_attn.reason.systems import BestOfN

CODE = """def area_of_square(side):
    return side * side

def area_of_rectangle(width, height):
    return width * height

def area_of_triangle(base, height):
    return base * height / 2
"""
PROMPTS = {
    "repetitive": f"Repeat this code with every function documented.\n\n{CODE}",
    "ordinary": "Why is the sky blue in the day and red in the evening? Explain it to a child.",
}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
CASES = {"1 thread, greedy": (1, {"do_sample": False}), "4 threads, sampled": (4, SAMPLED)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    model, tokenizer = weights.load()
    hf.attach(model, memory="1GiB")
    ways: dict[str, reason.Speculation | None] = {
        "plain": None,
        "lookup 4 x 1": reason.PromptLookup(num_tokens=4, candidates=1),
        "lookup 8 x 2": reason.PromptLookup(),
    }
    print("| text | threads | way | steps | of plain | accepted | a draft | time of plain |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for text, question in PROMPTS.items():
        for case, (n, options) in CASES.items():
            measure(model, tokenizer, question, (text, case, n), options, ways, args)


def measure(model, tokenizer, question, names, options, ways, args) -> None:  # type: ignore[no-untyped-def]
    text, case, n = names
    message = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    sampling = GenerationConfig(**options, max_new_tokens=args.tokens)
    times: dict[str, list[float]] = {name: [] for name in ways}
    traces = {}
    for _ in range(args.repeats):
        for name, speculation in ways.items():
            trace = traces[name] = reason.generate(
                model, tokenizer, prompt, protocol=BestOfN(n=n), sampling=sampling,
                speculation=speculation,
            )  # fmt: skip
            times[name].append(sum(trace.step_seconds[1:]))  # the prompt's own step aside
    plain = traces["plain"]
    for name, trace in traces.items():
        ratios = [x / y for x, y in zip(times[name], times["plain"], strict=True)]
        same = all(
            one.token_ids == other.token_ids
            for one, other in zip(trace.threads, plain.threads, strict=True)
        )
        print(
            f"| {text} | {case} | {name} | {len(trace.steps)} | "
            f"{len(trace.steps) / len(plain.steps):.2f} | {trace.acceptance_rate:.0%} | "
            f"{trace.accepted_per_draft:.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}){'' if same else ', other tokens'} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
