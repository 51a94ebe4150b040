"""Generations of known tokens or lengths, for measurements: a fan of threads over one prompt, and
protocols whose tags are written for the model."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import e2e_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fork_attn.demo import weights
from fork_attn.reason import Limits, Protocol, Thread, Trace, add_tags, together
from fork_attn.reason import script as scripts
from fork_attn.reason.job import Finished, Job
from fork_attn.reason.sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGGED = ("multiverse", "threadweaver", "threadweaver_rebase")
PROMPT = "Which of these numbers has most divisors? "
Path = tuple[tuple[int, int], ...]
Script = Mapping[Path, Sequence[int]]
"""Tokens by place in the tree."""


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, with the tags of all protocols that are measured."""
    if name == "smollm2":
        model, tokenizer = weights.load()
    else:
        model = e2e_models.load(name, torch.device("cpu"))
        characters = string.ascii_letters + string.digits + " :?.\n"
        vocab = {"<eos>": 0, **{char: i + 1 for i, char in enumerate(characters)}}
        plain = Tokenizer(models.WordLevel(vocab, unk_token="?"))
        plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        plain.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    for protocol in TAGGED:
        add_tags(model, tokenizer, protocol)
    return model, tokenizer


class Fan(Protocol):
    """Threads over given tokens, each with a first token of its own; a single one does not fork.

    Args:
        ids: of the prompt.
        firsts: the first token of each thread.
        tokens: that each thread writes.
    """

    name = "fan"

    def __init__(self, ids: Sequence[int], firsts: Sequence[int], tokens: int) -> None:
        self.ids, self.firsts, self.tokens = list(ids), list(firsts), tokens

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        return self.ids

    def run(self, root: Thread) -> scripts.Script:
        threads = [root]
        yield from root.flush()  # the prompt is a step of its own, which is not timed
        if len(self.firsts) > 1:
            threads = yield from root.fork(len(self.firsts))
        for thread, first in zip(threads, self.firsts, strict=True):
            thread.inject([first])
        yield from together([thread.write(max_tokens=self.tokens) for thread in threads])

    def written(self, trace: Trace) -> list[list[int]]:
        """What each thread wrote."""
        begin = len(self.ids) if len(self.firsts) == 1 else 0
        records = trace.threads if len(self.firsts) == 1 else trace.threads[1:]
        return [list(record.token_ids[begin + 1 :]) for record in records]


class Told(Sampler):
    """Samples greedily, and then returns the token that a script says: by place in the tree."""

    def __init__(self, script: Script) -> None:
        super().__init__(GenerationConfig(do_sample=False))
        self.left = {path: iter(ids) for path, ids in script.items()}

    def changed(self, **options: Any) -> Told:
        return self

    def pick(
        self, logits: torch.Tensor, threads: Sequence[Thread]
    ) -> tuple[list[int], list[float]]:
        _, logprobs = super().pick(logits, threads)
        return [next(self.left[thread.path]) for thread in threads], logprobs


def tagged_script(
    tokenizer: PreTrainedTokenizerBase, protocol: str, threads: int, tokens: int, rounds: int
) -> Script:
    """What a model writes that forks `rounds` times and joins its threads each time.

    Args:
        protocol: one of `TAGGED`.
        tokens: that each thread writes, and the parent between forks.
    """
    opens, ends, child_ends = {
        "multiverse": ("<Parallel><Goal>", "</Goal>", "</Path>"),
    }.get(protocol, ("<Parallel><Outlines>", "</Outlines>", "</Thread>"))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def words(seed: int) -> list[int]:
        return (ids(f" the number {seed} has more than that.\n") * tokens)[:tokens]

    entries = "".join(f"<Outline>{i + 1}: a</Outline>" for i in range(threads))
    root = words(0)
    script: dict[Path, list[int]] = {}
    for turn in range(1, rounds + 1):
        root += ids(opens + entries + ends)
        for i in range(threads):
            script[(turn, i),] = words(i) + ids(child_ends)
        root += words(turn)
    return {(): [*root, int(tokenizer.eos_token_id or 0)], **script}


def run_told(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: str,
    script: Script,
) -> Trace:
    """A generation whose tokens are those of the script.

    Raises:
        RuntimeError: it did not end as the script does, so that its times mean nothing.
    """
    options = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id)
    limits = Limits(max_new_tokens=10**6)
    job = Job(model, tokenizer, PROMPT, protocol, None, options, limits, 0)
    job.samplers = [Told(script)]
    traces = [e.trace for e in job.events(tokens=False) if isinstance(e, Finished)]
    wanted = sum(map(len, script.values()))
    if traces[0].finish != "done" or traces[0].total_tokens != wanted:
        got = f"{traces[0].finish} after {traces[0].total_tokens}"
        raise RuntimeError(f"{protocol}: expected {wanted} tokens, got {got}")
    return traces[0]
