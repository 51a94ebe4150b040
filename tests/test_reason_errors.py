"""Bad input to fork_attn.reason is refused before anything is done, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reason_pair import make_model, make_tokenizer
from transformers import GenerationConfig

from fork_attn import ForeignBranch, Unsupported, hf
from fork_attn.reason import Limits, Trace, add_tags, generate, protocols, register, stream
from fork_attn.reason.kv_bias import SegmentVectors
from fork_attn.reason.systems import BestOfN, ParaThinker, TreeOfThoughts

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = make_tokenizer("multiverse")


@pytest.fixture
def attached() -> Any:
    model = make_model(TOKENIZER)
    cache = hf.attach(model, num_pages=8, page_size=4)
    yield model
    assert cache.stats().pages_live == 0 and cache.branches == ()


def call(model: Any, tokenizer: Any = TOKENIZER, prompt: Any = "Hm", **options: Any) -> Trace:
    return generate(model, tokenizer, prompt, **{"protocol": "multiverse", **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"protocol": "none"}, ValueError, r"protocol: expected one of \['apar', .*, got 'none'"),
        ({"protocol": 3}, TypeError, "protocol: expected a name or a Protocol, got int"),
        (
            {"protocol": "npr"},
            ValueError,
            "protocol 'npr' needs <guideline>, <plan>.*add_tags",
        ),
        ({"protocol": "hogwild"}, ValueError, "'hogwild' asks a chat model.*chat template"),
        ({"prompt": ""}, ValueError, "prompt: expected some text, got none"),
        ({"prompt": ["a", " "]}, ValueError, r"prompt\[1\]: expected some text"),
        ({"prompt": []}, ValueError, "prompt: expected at least one prompt"),
        ({"prompt": 3}, TypeError, "prompt: expected a str or a list of str, got int"),
        ({"prompt": ["a", 3]}, TypeError, "prompt: expected a str or a list of str"),
        ({"prompt": "x" * 32}, ValueError, "the 32 tokens that the cache's 8 pages hold, got 32"),
        ({"prompt": "x" * 3000}, ValueError, "the 2048 tokens that the model has positions for"),
        ({"limits": Limits(max_pages=1), "prompt": "x" * 5}, ValueError, "max_pages=1 holds"),
        ({"limits": {}}, TypeError, "limits: expected Limits, got dict"),
        ({"sampling": {}}, TypeError, "sampling: expected a GenerationConfig, got dict"),
        ({"sampling": GenerationConfig(num_beams=4)}, Unsupported, "sampling: num_beams=4"),
        ({"sampling": GenerationConfig(guidance_scale=2.0)}, Unsupported, "guidance_scale=2.0"),
        ({"seed": "x"}, TypeError, "seed: expected an int, got str"),
        ({"tokenizer": None}, TypeError, "tokenizer: expected a tokenizer, got NoneType"),
    ],
)
def test_arguments(
    attached: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(attached, **options)


def test_a_stream_refuses_before_its_first_event(attached: Any) -> None:
    with pytest.raises(ValueError, match="protocol: expected one of"):
        stream(attached, TOKENIZER, "x", protocol="none")


@pytest.mark.parametrize("name", ["max_new_tokens", "max_fanout", "max_seconds", "max_pages"])
def test_limits(name: str) -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"{name}: expected more than 0, got {bad}"):
            Limits(**{name: bad})
    with pytest.raises(TypeError, match=f"{name}: expected an? .*, got str"):
        Limits(**{name: "3"})
    with pytest.raises(TypeError, match=name):
        Limits(**{name: True})


def test_models() -> None:
    with pytest.raises(TypeError, match="model: expected a PreTrainedModel, got Linear"):
        call(torch.nn.Linear(2, 2))
    model, other = make_model(TOKENIZER), make_model(TOKENIZER)
    cache = hf.attach(other, num_pages=8)
    with pytest.raises(ForeignBranch, match="cache: expected the cache of LlamaForCausalLM"):
        call(model, cache=cache)
    hf.attach(model, num_pages=8)
    with pytest.raises(ForeignBranch, match="cache: expected the cache that"):
        call(model, cache=cache)


def test_protocol_options() -> None:
    with pytest.raises(ValueError, match="n: expected an int of at least 1, got 0"):
        BestOfN(n=0)
    with pytest.raises(ValueError, match="branching: expected an int of at least 1"):
        TreeOfThoughts(branching=-1)
    with pytest.raises(ValueError, match="paths: expected an int of at least 1"):
        ParaThinker(paths=0)
    table = SegmentVectors(torch.zeros(2, 2, 32), torch.zeros(2, 2, 32))
    with pytest.raises(ValueError, match="vectors: expected one for each of 3 paths, got 2"):
        ParaThinker(paths=3, vectors=table)
    with pytest.raises(ValueError, match="keys, values: expected"):
        SegmentVectors(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="the name 'npr' is taken"):
        register(protocols()["npr"])


def test_vectors_must_fit_the_model() -> None:
    protocol = ParaThinker(
        paths=2, vectors=SegmentVectors(torch.zeros(2, 2, 31), torch.zeros(2, 2, 31))
    )
    tokenizer = make_tokenizer(protocol)
    model = make_model(tokenizer)
    hf.attach(model, num_pages=8)
    with pytest.raises(ValueError, match=r"vectors: expected .*32.* for LlamaForCausalLM"):
        call(model, tokenizer, protocol=protocol)
    fused = make_model(tokenizer, "phi3")
    hf.attach(fused, num_pages=8)
    with pytest.raises(Unsupported, match="Phi3ForCausalLM has no k_proj and v_proj"):
        call(fused, tokenizer, protocol=protocol)


def test_positions_that_cannot_be_shifted() -> None:
    tokenizer = make_tokenizer("threadweaver_rebase")
    model = make_model(tokenizer, "gpt2", n_positions=256)
    hf.attach(model, num_pages=8)
    with pytest.raises(Unsupported, match=r"protocol: 'threadweaver_rebase' reads.*GPT2"):
        call(model, tokenizer, protocol="threadweaver_rebase")


def test_add_tags() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    before = len(tokenizer)
    added = add_tags(model, tokenizer, "threadweaver")
    assert "</Thread>" in added and len(tokenizer) == before + len(added)
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    assert add_tags(model, tokenizer, "threadweaver") == []
    hf.attach(model, num_pages=64)
    trace = call(model, tokenizer, protocol="threadweaver", limits=Limits(max_new_tokens=5))
    assert trace.total_tokens == 5


def test_a_damaged_trace(tmp_path: Any) -> None:
    path = tmp_path / "trace.json"
    for text, message in (
        ("[]", "expected a 'fork-attn trace' of version 1"),
        ('{"format": "fork-attn trace", "version": 0}', "version 1, got .*0"),
        ('{"format": "fork-attn trace", "version": 1}', "damaged"),
        ("{", "Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Trace.load(path)
