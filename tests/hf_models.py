"""Tiny transformers models with random weights, and what they ought to compute.

A further model is one more line in `MODELS`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from fork_attn import Branch, Draft, ForkedKVCache, hf

VOCAB = 97
WINDOW = 8
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_GEMMA_N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Name: the model class and what its config takes beyond _COMMON.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "mistral": ("MistralForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", _EXPERTS),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", _MIXED),
    "gemma3n_text": ("Gemma3nForCausalLM", {**_GEMMA_N, "activation_sparsity_pattern": [0.0] * 4}),
    "gemma4_text": ("Gemma4ForCausalLM", {**_GEMMA_N, "global_head_dim": 32}),
    "gpt_oss": ("GptOssForCausalLM", _EXPERTS),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {**_MIXED, "logit_scale": 1.0}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.5}),
    "glm4": ("Glm4ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "apertus": ("ApertusForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {"logit_scale": 1.0}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", _MIXED),
    "gemma": ("GemmaForCausalLM", {}),
    "glm4_moe": ("Glm4MoeForCausalLM", {"n_routed_experts": 4, "num_experts_per_tok": 2}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", _EXPERTS),
    "helium": ("HeliumForCausalLM", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {}),
    "ministral": ("MinistralForCausalLM", _MIXED),
    "olmo3": ("Olmo3ForCausalLM", _MIXED),
    "persimmon": ("PersimmonForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", _EXPERTS),
    "seed_oss": ("SeedOssForCausalLM", {}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 2,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
}

# Models whose scores stock SDPA gets wrong or refuses: soft caps and sinks.
EAGER_ONLY = ("gemma2", "gpt_oss")


def build(name: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A tiny model in fp32, eval mode, with weights large enough to make its layers matter."""
    class_name, extra = MODELS[name]
    return build_class(class_name, seed, **{**extra, **overrides})


def build_class(class_name: str, seed: int = 0, **extra: Any) -> transformers.PreTrainedModel:
    cls = getattr(transformers, class_name)
    config = make_config(cls.config_class, **extra)
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def make_config(config_class: Any, **extra: Any) -> transformers.PreTrainedConfig:
    """A config of the common sizes, leaving out those that its class does not know."""
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= set(config_class.attribute_map)
    common = {key: value for key, value in _COMMON.items() if key in known}
    return config_class(**{**common, **extra})


def stock_copy(model: transformers.PreTrainedModel, name: str) -> transformers.PreTrainedModel:
    """The same weights with the attention that transformers advises for them."""
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager" if name in EAGER_ONLY else "sdpa")
    return stock


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


class Oracle:
    """Runs an attached model, and recomputes all its logits in one stock eager forward.

    Every token that was ever fed is a node; a branch is the list of the nodes that it sees. The
    reference is a single forward over all nodes, each with its own position and mask row.
    """

    def __init__(self, model: transformers.PreTrainedModel, **options: Any) -> None:
        self.stock = copy.deepcopy(model)
        self.stock.set_attn_implementation("eager")
        self.model = model
        self.cache: ForkedKVCache = hf.attach(model, **options)
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sees: list[list[int]] = []
        self.logits: dict[int, torch.Tensor] = {}
        self.contexts: dict[Branch, list[int]] = {}

    def new_branch(self) -> Branch:
        branch = self.cache.new_branch()
        self.contexts[branch] = []
        return branch

    def fork(self, branch: Branch, n: int) -> list[Branch]:
        children = branch.fork(n)
        for child in children:
            self.contexts[child] = list(self.contexts[branch])
        return children

    def feed(self, tokens: Mapping[Branch, Sequence[int]]) -> torch.Tensor:
        """One ragged forward; the last logits of every branch, (n, vocab)."""
        starts = {branch: branch.position for branch in tokens}
        rows = iter(hf.forward(self.model, tokens, logits="all"))
        for branch, ids in tokens.items():
            for i, token in enumerate(ids):
                seen = self.contexts[branch]
                seen.append(self.add_node(token, starts[branch] + i, seen, next(rows)))
        return torch.stack([self.logits[self.contexts[branch][-1]] for branch in tokens])

    def feed_draft(
        self, branch: Branch, ids: Sequence[int], parents: Sequence[int], path: Sequence[int]
    ) -> None:
        """Verifies a token tree in one forward and accepts a path of it."""
        start, context = branch.position, self.contexts[branch]
        with self.cache.step({branch: Draft(parents)}) as step:
            rows = hf.forward(self.model, {branch: ids}, step=step, logits="all")
            assert step.state == "open"
            step.accept(path)
        lines: list[list[int]] = []
        for i, token in enumerate(ids):
            before = lines[parents[i]] if parents[i] >= 0 else []
            node = self.add_node(token, start + len(before), [*context, *before], rows[i])
            lines.append([*before, node])
        context += lines[path[-1]] if path else []

    def add_node(self, token: int, position: int, seen: list[int], row: torch.Tensor | None) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.positions.append(position)
        self.sees.append([*seen, node])
        if row is not None:
            self.logits[node] = row
        return node

    def join(self, parent: Branch, children: Sequence[Branch], pending: dict[Branch, int]) -> None:
        """`hf.join`, whose fed tokens give no logits to compare."""
        starts = {child: child.position for child in pending}
        hf.join(parent, children, pending=pending)
        for child, token in pending.items():
            seen = self.contexts[child]
            seen.append(self.add_node(token, starts[child], seen, None))
        context = self.contexts[parent]
        for child in children:
            context += [node for node in self.contexts.pop(child) if node not in context]

    def hide(self, hidden: set[int], since: int) -> None:
        """Lets the reference's tokens from node `since` on no longer see the hidden ones."""
        for node in range(since, len(self.tokens)):
            self.sees[node] = [seen for seen in self.sees[node] if seen not in hidden]

    def max_error(self) -> float:
        """The largest difference of any known logit to the reference."""
        got = torch.stack(list(self.logits.values()))
        assert got.isfinite().all()
        return (got - self.reference()[list(self.logits)]).abs().max().item()

    def reference(self) -> torch.Tensor:
        """(nodes, vocab) logits of the stock model."""
        n = len(self.tokens)
        visible = torch.zeros(n, n, dtype=torch.bool)
        for node, seen in enumerate(self.sees):
            visible[node, seen] = True
        position = torch.tensor(self.positions)
        windowed = visible & (position[:, None] - position[None, :] < WINDOW)
        masks = {"full_attention": _additive(visible), "sliding_attention": _additive(windowed)}
        kinds = set(layer_kinds(self.stock.config))
        with torch.no_grad():
            return self.stock(
                input_ids=torch.tensor([self.tokens]),
                position_ids=position[None],
                attention_mask=masks if len(kinds) > 1 else masks[kinds.pop()],
                use_cache=False,
            ).logits[0]


def layer_kinds(config: Any) -> list[str]:
    """Each layer's kind, also where the config has one window for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    window = getattr(config, "sliding_window", None)
    return ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers


def _additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
