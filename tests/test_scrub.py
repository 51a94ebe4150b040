"""Zero-on-free and NaN in unseen slots."""

from __future__ import annotations

import random

import pytest
import torch
from cache_pair import CachePair
from kv_table import KVTable, Model
from test_streams import FakeStream

from fork_attn import ForkedKVCache, OutOfPages
from fork_attn.scrub import fill_with_nan

SIZES = {"num_layers": 2, "num_pages": 12, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 8}
TABLE = KVTable(Model())


def write(cache: ForkedKVCache, tokens: dict) -> None:
    with cache.step(tokens) as step:
        n = step.num_tokens
        for layer in range(2):
            cache.attend(layer, *(torch.ones(n, 1, 8, dtype=cache.dtype),) * 3, step)


def test_freed_pages_are_zero_before_they_can_be_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORK_ATTN_ZERO_ON_FREE", "1")
    cache = ForkedKVCache(**SIZES, page_size=4)  # type: ignore[arg-type]
    for layer in range(2):
        for tensor in cache.layer(layer):
            tensor.fill_(3)
    root = cache.new_branch()
    write(cache, {root: 14})
    pages = root.page_table().long()
    child = root.fork_at(5)
    root.crop(5)
    for layer in range(2):
        for tensor in cache.layer(layer):
            assert (tensor[pages[2:]] == 0).all() and (tensor[pages[:1]] == 1).all()
    stream = FakeStream()
    cache._streams.add(stream)
    cache.free([root, child])
    assert all((c[pages[:1]] == 1).all() for n in range(2) for c in cache.layer(n))  # still read
    stream.finish()
    cache.step({cache.new_branch(): 1}).rollback()
    assert all((c[pages] == 0).all() for n in range(2) for c in cache.layer(n))


def test_unseen_slots_hold_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORK_ATTN_DEBUG", "poison")
    rng = random.Random(int(torch.randint(2**31, ())))
    pair = CachePair(Model(), num_pages=20, page_size=3, table=TABLE)
    pair.new_branch()
    pair.poison = lambda slots: None  # type: ignore[method-assign]
    size = 3
    for _ in range(80):
        live = list(pair.ids)
        some = rng.sample(live, rng.randint(1, min(3, len(live))))
        try:
            match rng.choice(["step", "step", "fork", "crop", "free", "excise", "join"]):
                case "step":
                    pair.step({b: rng.randint(1, 5) for b in some}, attend=True)
                case "fork" if len(live) < 8:
                    pair.fork(some[0], 2)
                case "crop":
                    pair.crop(some[0], rng.randint(0, some[0].length))
                case "excise":
                    pair.excise(some[0], *sorted(rng.choices(range(some[0].length + 1), k=2)))
                case "join" if len(some) > 1:
                    pair.join(some[0], some[1:])
                case "free" if len(live) > len(some):
                    pair.free(*some)
        except OutOfPages:
            pair.free(*live[1:])
            pair.crop(live[0], 1 if live[0].length else 0)
        pair.check()
        seen = torch.zeros(20 * size, dtype=torch.bool)
        for branch in pair.ids:
            seen[pair.slots(branch)] = True
        for layer in range(2):
            for cache in pair.cache.layer(layer):
                values = cache[torch.arange(20 * size) // size, torch.arange(20 * size) % size]
                assert values[~seen].isnan().all() and not values[seen].isnan().any()


def test_e4m3_has_a_nan() -> None:
    cache = torch.zeros(2, 4, 1, 8).to(torch.float8_e4m3fn)
    fill_with_nan(cache, (torch.tensor([1]), torch.tensor([2])))
    assert cache.float().isnan().sum() == 8 and cache[1, 2].float().isnan().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"FORK_ATTN_DEBUG": "nan"},
            "FORK_ATTN_DEBUG: expected '', 'poison', 'pages' or .* got 'nan'",
        ),
        ({"FORK_ATTN_ZERO_ON_FREE": "yes"}, "FORK_ATTN_ZERO_ON_FREE: expected"),
        ({"FORK_ATTN_DEBUG": "poison", "FORK_ATTN_ZERO_ON_FREE": "1"}, "expected one of them"),
    ],
)
def test_bad_settings(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ForkedKVCache(**SIZES)  # type: ignore[arg-type]
