"""Scripted generations over a tiny model, and dense passes of the stock model to compare with.

A `Forced` sampler picks the tokens that a test has written down, and keeps the logits that it saw.
A `Dense` holds the same tokens as the test places them: by hand, after the system's own masks and
positions, never from the trace or the cache.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from hf_models import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fork_attn import ForkedKVCache, hf
from fork_attn.reason import Limits, Protocol, Speculation, Trace, get_protocol
from fork_attn.reason.job import Finished, Job

CHARACTERS = string.ascii_letters + string.digits + " .,:;!?()+-*/=<>#[]{}|'\"_@&%^\n"
EOS = "<eos>"
TOLERANCE = 1e-4
Path = tuple[tuple[int, int], ...]
PROMPT = "Is 91 prime?"
SAMPLED = GenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=40)


def make_tokenizer(*protocols: str | Protocol, extra: Sequence[str] = ()) -> Any:
    """One token per character, and one for each tag of the protocols."""
    tags = [tag for protocol in protocols for tag in get_protocol(protocol).tags()]
    vocab = {EOS: 0, **{char: i + 1 for i, char in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.add_tokens([*dict.fromkeys([*tags, *extra])], special_tokens=True)
    return fast


def make_model(tokenizer: Any, name: str = "llama", **config: Any) -> transformers.PreTrainedModel:
    config = {"max_position_embeddings": 2048, **config}
    return build(name, vocab_size=len(tokenizer), eos_token_id=0, **config)


class Forced:
    """Picks tokens from a script, per place in the tree; keeps the logits that it was given."""

    config = GenerationConfig()

    def __init__(self, script: Mapping[Path, Sequence[int]]) -> None:
        self.script = {path: list(ids) for path, ids in script.items()}
        self.rows: dict[tuple[Path, int], torch.Tensor] = {}
        self.count: dict[Path, int] = {}
        self.places: dict[tuple[int, int], tuple[Path, int]] = {}

    def changed(self, **options: Any) -> Forced:
        return self

    def pick(self, logits: torch.Tensor, threads: Sequence[Any]) -> tuple[list[int], list[float]]:
        assert logits.shape[0] == len(threads)
        ids = []
        for row, thread in zip(logits, threads, strict=True):
            k = self.count.get(thread.path, 0)
            self.count[thread.path] = k + 1
            self.rows[thread.path, k] = row.clone()
            self.places[thread.log.id, len(thread.log.token_ids)] = (thread.path, k)
            ids.append(self.script[thread.path][k])
        return ids, [0.0] * len(ids)

    @property
    def used_up(self) -> bool:
        return all(self.count.get(path, 0) == len(ids) for path, ids in self.script.items())


class Dense:
    """Tokens with positions, and what each sees, for one forward of the stock model."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.stock = copy.deepcopy(model)
        self.stock.set_attn_implementation("eager")
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sees: list[list[int]] = []
        self.views: list[dict[int, int]] = []
        self.expected: dict[tuple[Path, int], int] = {}
        self.count: dict[Path, int] = {}

    def give(self, ids: Sequence[int], position: int, seen: Sequence[int]) -> list[int]:
        """Adds tokens one after another, each seeing `seen` and those before it.

        Returns:
            `seen` and the new ones.
        """
        line = list(seen)
        for i, token in enumerate(ids):
            line.append(len(self.tokens))
            self.tokens.append(token)
            self.positions.append(position + i)
            self.sees.append(list(line))
        return line

    def view(self, node: int) -> None:
        """Lays what a node sees end to end, whatever the positions at which it was written."""
        self.views += [{}] * (node + 1 - len(self.views))
        self.views[node] = {other: i for i, other in enumerate(self.sees[node])}

    def relative(self) -> torch.Tensor:
        """(n, n): by how much the query of token i is turned from the key of token j."""
        position = torch.tensor(self.positions)
        offsets = position[:, None] - position[None, :]
        for i, view in enumerate(self.views):
            for j, at in view.items():
                offsets[i, j] = view[i] - at
        return offsets

    def sample(
        self, path: Path, ids: Sequence[int], position: int, seen: Sequence[int], fed: bool = True
    ) -> list[int]:
        """Like `give`, for tokens that `path` samples: each from the logits of the one before.

        Args:
            fed: False where the last token is sampled, but never fed.
        """
        line = list(seen)
        for i, token in enumerate(ids):
            k = self.count.get(path, 0)
            self.count[path] = k + 1
            self.expected[path, k] = line[-1]
            if fed or i < len(ids) - 1:
                line = self.give([token], position + i, line)
        return line

    def max_error(self, forced: Forced) -> float:
        """The largest difference between the sampler's logits and the stock model's."""
        assert forced.rows.keys() == self.expected.keys()
        n = len(self.tokens)
        visible = torch.zeros(n, n, dtype=torch.bool)
        for node, seen in enumerate(self.sees):
            visible[node, seen] = True
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        if self.views:
            use_relative(self.stock, self.relative())
            self.positions = [0] * n  # at position 0 RoPE turns nothing
        with torch.no_grad():
            logits = self.stock(
                input_ids=torch.tensor([self.tokens]),
                position_ids=torch.tensor([self.positions]),
                attention_mask=mask,
                use_cache=False,
            ).logits[0]
        got = torch.stack(list(forced.rows.values()))
        want = logits[[self.expected[key] for key in forced.rows]]
        assert got.isfinite().all()
        return (got - want).abs().max().item()


def use_relative(model: transformers.PreTrainedModel, relative: torch.Tensor) -> None:
    """Makes a Llama-like model turn the query of token i for each key j by relative[i, j]."""
    theta = model.config.rope_parameters["rope_theta"]

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        dim, groups = query.shape[-1], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = relative[..., None].double() * frequency  # (n, n, dim / 2)
        cos, sin = (x.float() for x in (angle.cos(), angle.sin()))
        a, b = query[:, :, :, None].chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        scores = torch.einsum("bhijd,bhjd->bhij", turned, key) * scaling + mask
        out = scores.softmax(-1) @ value
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("relative_reference", attention)
    model.config._attn_implementation = "relative_reference"


def dense_of_trace(model: transformers.PreTrainedModel, trace: Trace, forced: Forced) -> Dense:
    """The dense pass that a trace describes by its spans, watches and positions alone."""
    dense = Dense(model)
    nodes: dict[tuple[int, int], int] = {}
    for thread in trace.threads:
        seen = [nodes[s.thread, i] for s in thread.context for i in range(s.start, s.end)]
        for i, token in enumerate(thread.token_ids):
            if (place := forced.places.get((thread.id, i))) is not None:
                dense.expected[place] = seen[-1]
            elif i == 0 and thread.kind == "continuation" and not thread.injected[0]:
                # Sampled before the join, and fed behind it.
                before = trace.threads[thread.parents[0]]
                last = len(before.token_ids)
                dense.expected[forced.places[before.id, last]] = nodes[before.id, last - 1]
            position = thread.positions[i]
            if position is not None:
                seen = dense.give([token], position, seen)
                nodes[thread.id, i] = seen[-1]
    return dense


def run_forced(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    prompts: str | list[str],
    protocol: str | Protocol,
    samplers: Forced | list[Forced],
    *,
    limits: Limits | None = None,
    speculation: Speculation | None = None,
    **options: Any,
) -> list[Trace]:
    """Runs prompts with forced tokens, one sampler a prompt; checks that all pages come back."""
    cache = hf.attach(model, **{"num_pages": 256, "page_size": 4, **options})
    forced = samplers if isinstance(samplers, list) else [samplers]
    job = Job(
        model, tokenizer, prompts, protocol, cache, GenerationConfig(), limits, 0,
        speculation=speculation,
    )  # fmt: skip
    job.samplers = forced
    done = {e.prompt: e.trace for e in job.events(tokens=False) if isinstance(e, Finished)}
    assert cache.stats().pages_live == 0 and cache.stats().branches == 0
    cache.check()
    return [done[i] for i in range(len(done))]


def check_trace(trace: Trace) -> None:
    """What every trace promises: its parts fit together, and it survives JSON."""
    from fork_attn.reason.trace_json import dumps, loads

    assert loads(dumps(trace)) == trace
    for thread in trace.threads:
        n = len(thread.token_ids)
        for column in (thread.positions, thread.logprobs, thread.sampled_steps, thread.fed_steps):
            assert len(column) == n
        assert len(thread.text_ends) == n and sum(thread.injected) == n - thread.num_sampled
        assert all(parent < thread.id for parent in thread.parents)
        for span in thread.context:
            assert span.end <= len(trace.threads[span.thread].token_ids)
            fed = trace.threads[span.thread].positions[span.start : span.end]
            assert None not in fed
        fed_steps = [step for step in thread.fed_steps if step is not None]
        assert fed_steps == sorted(fed_steps) and all(s < len(trace.steps) for s in fed_steps)
    assert sum(step.tokens for step in trace.steps) == sum(
        step is not None for thread in trace.threads for step in thread.fed_steps
    )


def attached(
    protocol: str | Protocol = "best_of_n", num_pages: int = 256, **config: Any
) -> tuple[transformers.PreTrainedModel, Any, ForkedKVCache]:
    tokenizer = make_tokenizer(protocol)
    model = make_model(tokenizer, **config)
    return model, tokenizer, hf.attach(model, num_pages=num_pages, page_size=4)


def assert_free(cache: ForkedKVCache) -> None:
    assert cache.stats().pages_live == 0 and cache.branches == ()
    cache.check()
