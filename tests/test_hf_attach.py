"""What `attach` accepts, refuses and makes of a model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from hf_models import build, build_class, random_tokens, stock_copy

from fork_attn import (
    Unsupported,
    hf,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("MambaForCausalLM", {}, "recurrent"),
    ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, "recurrent"),
    ("Qwen3NextForCausalLM", HYBRID, "recurrent"),
    ("JambaForCausalLM", {"num_experts": 2}, "recurrent"),
    ("RwkvForCausalLM", {}, "recurrent"),
    ("Llama4ForCausalLM", {"num_local_experts": 2}, "chunked attention"),
    ("DeepseekV32ForCausalLM", {}, "(deepseek_sparse|indexed)_attention layers"),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("Phi3ForCausalLM", {"rope_parameters": LONGROPE}, "'longrope'"),
    ("FalconForCausalLM", {}, "no attention interface"),
    ("BloomForCausalLM", {}, "no attention interface"),
    ("MptForCausalLM", {}, "no attention interface"),
    ("GPTJForCausalLM", {}, "no attention interface"),
    ("T5ForConditionalGeneration", {}, "encoder-decoder"),
    ("BertLMHeadModel", {}, "not causal"),
    ("GPT2LMHeadModel", {"add_cross_attention": True}, "not causal"),
]


@pytest.mark.parametrize(("class_name", "extra", "reason"), REFUSED)
def test_refused_by_name(class_name: str, extra: dict[str, Any], reason: str) -> None:
    model = build_class(class_name, **extra)
    before = model.config._attn_implementation
    with pytest.raises(Unsupported, match=f"{class_name}.*{reason}"):
        hf.attach(model, num_pages=4)
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_model_that_drops_keyword_arguments_is_refused_at_its_first_forward() -> None:
    model = build_class("NemotronForCausalLM")
    cache = hf.attach(model, num_pages=8)
    branch = cache.new_branch()
    with pytest.raises(Unsupported, match=r"layers \[0, 1\] of NemotronForCausalLM ran without"):
        hf.forward(model, {branch: [3, 4]})
    assert branch.length == 0
    with (
        pytest.raises(Unsupported, match=r"layers \[0, 1\] of NemotronForCausalLM ran without"),
        torch.no_grad(),
    ):
        model(torch.tensor([[3, 4]]), past_key_values=hf.ForkCache(cache))
    assert cache.branches == (branch,)


def test_attention_that_was_changed_after_attach_is_noticed() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=8)
    model.set_attn_implementation("eager")
    branch = cache.new_branch()
    with pytest.raises(Unsupported, match="changed after attach"):
        hf.forward(model, {branch: [3, 4]})
    assert branch.length == 0


def test_attach_twice_raises() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=8)
    for again in (model, model.model):
        with pytest.raises(ValueError, match="attached already"):
            hf.attach(again, num_pages=8)
    hf.forward(model, {cache.new_branch(): [3]})


def test_attach_takes_transformers_models_only() -> None:
    with pytest.raises(TypeError, match="expected a PreTrainedModel, got Linear"):
        hf.attach(torch.nn.Linear(2, 2), num_pages=8)


def test_memory_counts_whole_pages() -> None:
    # 2 layers x 2 heads x (16 + 16) x 4 bytes x 16 tokens
    page = 2 * 2 * 32 * 4 * 16
    sizes = {page: 1, 10 * page - 1: 9, "1MiB": 128, "0.5 mb": 61, f"{page}B": 1}
    for memory, pages in sizes.items():
        assert hf.attach(build("llama"), memory=memory).num_pages == pages
    assert hf.attach(build("llama")).num_pages == 2**30 // page
    latent = hf.attach(build("deepseek_v3"), memory="1MiB", page_size=8)
    assert latent.num_pages == 2**20 // (2 * 4 * (24 + 12) * 4 * 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_pages": 4, "memory": "1GB"}, ValueError, "expected one of them"),
        ({"memory": 100}, ValueError, "at least one page of 8192 bytes, got 100"),
        ({"memory": "many"}, ValueError, "'many'"),
        ({"memory": "-1GB"}, ValueError, "'-1GB'"),
        ({"memory": "3 pages"}, ValueError, "'3 pages'"),
        ({"memory": 1.5}, TypeError, "got float"),
        ({"memory": True}, TypeError, "got bool"),
        ({"memory": "1GB", "page_size": 0}, ValueError, "page_size"),
        ({"num_pages": 0}, ValueError, "num_pages"),
        ({"num_pages": 4, "tail": "cut"}, ValueError, "tail"),
        ({"num_pages": 4, "dtype": torch.int8}, TypeError, "dtype"),
    ],
)
def test_bad_options_leave_the_model_alone(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        hf.attach(model, **options)
    assert model.config._attn_implementation == "sdpa"
    hf.attach(model, num_pages=4)


def test_stored_dtype_can_be_narrower() -> None:
    model = build("llama")
    stock = stock_copy(model, "llama")
    cache = hf.attach(model, num_pages=16, dtype=torch.bfloat16)
    ids = random_tokens(9, seed=1)
    got = hf.forward(model, {cache.new_branch(): ids}, logits="all")
    assert got.dtype == torch.float32 and cache.layer(0)[0].dtype == torch.bfloat16
    error = (got - stock(torch.tensor([ids])).logits[0]).abs().max().item()
    assert 1e-4 < error < 0.3


def test_bfloat16_model() -> None:
    model = build("llama").to(torch.bfloat16)
    stock = stock_copy(model, "llama")
    cache = hf.attach(model, num_pages=16)
    ids = random_tokens(9, seed=1)
    got = hf.forward(model, {cache.new_branch(): ids}, logits="all")
    assert got.dtype == cache.dtype == torch.bfloat16
    torch.testing.assert_close(got, stock(torch.tensor([ids])).logits[0], rtol=0, atol=0.3)


def test_inference_mode_and_no_grad_mix() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=16)
    branch = cache.new_branch()
    with torch.inference_mode():
        hf.forward(model, {branch: [3, 4, 5]})
    hf.forward(model, {branch: [6]})
    with torch.inference_mode():
        hf.forward(model, {branch: [7]})
    assert branch.length == 5


def test_cache_dies_with_its_model() -> None:
    model = build("llama")
    cache = hf.attach(model, num_pages=8)
    branch, gone = cache.new_branch(), weakref.ref(model)
    hf.forward(model, {branch: [3, 4]})
    child = branch.fork()[0]
    del model
    gc.collect()
    assert gone() is None, "the cache keeps the weights alive"
    with pytest.raises(Unsupported, match="still alive"):
        hf.join(branch, [child], pending={child: 5})
    hf.join(branch, [child])
    assert branch.length == 2


def test_window_that_the_config_did_not_announce() -> None:
    model = build("mistral")
    cache = hf.attach(model, num_pages=8)
    model.config.sliding_window = 5
    branch = cache.new_branch()
    with pytest.raises(ValueError, match=r"layer 0 of MistralForCausalLM asks for 5, .* 8"):
        hf.forward(model, {branch: [3, 4]})
    assert branch.length == 0


def test_heads_come_from_the_tensors_and_stay() -> None:
    """As under tensor parallelism, where a rank has its share of the config's heads."""
    model = build("llama")
    half = build("llama", num_attention_heads=2, num_key_value_heads=1, seed=1)
    cache = hf.attach(model, num_pages=8)
    half.set_attn_implementation("fork_attn")
    whole = copy.deepcopy(model.model.layers)
    model.model.layers = half.model.layers
    hf.forward(model, {cache.new_branch(): [3, 4]})
    assert cache.layer(0)[0].shape[2] == 1
    model.model.layers = whole
    branch = cache.new_branch()
    with pytest.raises(ValueError, match="expected shape"):
        hf.forward(model, {branch: [3, 4]})
    assert branch.length == 0


def test_vision_language_model_takes_text() -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=96
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    stock = copy.deepcopy(model)
    cache = hf.attach(model, num_pages=32, page_size=4)
    assert model.config.vision_config._attn_implementation == "sdpa"
    ids = torch.tensor([random_tokens(11, seed=1)])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    rows = hf.ForkCache(cache)
    got = model.generate(ids, past_key_values=rows, **options)
    assert got.tolist() == stock.generate(ids, **options).tolist()
    logits = hf.forward(model, {cache.new_branch(): ids[0].tolist()}, logits="all")
    torch.testing.assert_close(logits, stock(ids).logits[0], rtol=0, atol=1e-4)
