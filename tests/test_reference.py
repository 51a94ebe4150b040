"""The oracle itself, against cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fork_attn.reference import attention, step_mask
from fork_attn.reference_cache import DeepCopyCache, Rows, Token

INF = math.inf


def _rows(
    *identities: int, parents: list[int] | None = None, path: list[int] | None = None
) -> Rows:
    return Rows([Token(i, 0) for i in identities], parents, path)


def _ids(cache: DeepCopyCache, branch: int) -> list[int]:
    return [t.identity for t in cache.tokens(branch)]


def _positions(cache: DeepCopyCache, branch: int) -> list[int]:
    return [t.position for t in cache.tokens(branch)]


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64)


def test_attention_of_two_keys_by_hand() -> None:
    q, k = _ones(1, 1, 1), torch.tensor([[[0.0]], [[math.log(3)]]])
    v = torch.tensor([[[1.0, 0.0]], [[5.0, 8.0]]])
    out, lse = attention(q, k, v, torch.ones(1, 2, dtype=torch.bool), softmax_scale=1.0)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out[0, 0], torch.tensor([4.0, 6.0], dtype=torch.float64))
    assert lse.item() == pytest.approx(math.log(4))
    _, scaled = attention(q, k, v, torch.ones(1, 2, dtype=torch.bool), softmax_scale=2.0)
    assert scaled.item() == pytest.approx(math.log(1 + 9))


def test_the_default_scale_is_one_over_the_root_of_the_dimension() -> None:
    q, k = _ones(1, 1, 4), _ones(1, 1, 4)
    _, lse = attention(q, k, k, torch.ones(1, 1, dtype=torch.bool))
    assert lse.item() == pytest.approx(2.0)


def test_a_softcap_comes_before_the_mask_and_sinks_after() -> None:
    q, k = _ones(2, 1, 1), torch.tensor([[[4.0]], [[100.0]]])
    v = torch.tensor([[[1.0]], [[7.0]]])
    mask = torch.tensor([[True, False], [False, False]])
    sinks = torch.tensor([0.5])
    out, lse = attention(q, k, v, mask, softmax_scale=1.0, softcap=2.0, sinks=sinks)
    score = 2 * math.tanh(2.0)
    total = math.exp(score) + math.exp(0.5)
    assert lse[0].item() == pytest.approx(math.log(total))
    assert out[0].item() == pytest.approx(math.exp(score) / total)
    assert lse[1].item() == 0.5 and out[1].item() == 0.0


def test_a_row_without_keys() -> None:
    k = torch.full((1, 1, 2), math.nan)
    out, lse = attention(_ones(1, 2, 2), k, k, torch.zeros(1, 1, dtype=torch.bool))
    assert out.tolist() == [[[0.0, 0.0], [0.0, 0.0]]] and lse.tolist() == [[-INF, -INF]]


def test_unseen_keys_may_be_nan_and_groups_share_a_key_head() -> None:
    k = torch.tensor([[[1.0], [2.0]], [[math.nan], [math.nan]]])
    q = torch.tensor([[[1.0], [2.0], [1.0], [2.0]]])
    mask = torch.tensor([[True, False]])
    _, lse = attention(q, k, k, mask, softmax_scale=1.0)
    assert lse.tolist() == [[1.0, 2.0, 2.0, 4.0]]


def test_masks_of_a_step() -> None:
    t, f = True, False
    assert step_mask([0, 1], [2, 3]).tolist() == [[t, t, t, f], [t, t, t, t]]
    assert step_mask([0, 1], [2, 3], window=2).tolist() == [[f, t, t, f], [f, f, t, t]]
    tree = step_mask([0], [1, 2, 1, 2], parents=[-1, 0, -1, 2])
    assert tree.tolist() == [[t, t, f, f, f], [t, t, t, f, f], [t, f, f, t, f], [t, f, f, t, t]]
    # Keys ahead of the row, which joins bring, stay within any window.
    assert step_mask([90, 3], [7], window=4).tolist() == [[t, f, t]]


def test_positions_of_plain_and_drafted_tokens() -> None:
    cache = DeepCopyCache()
    b = cache.new_branch()
    cache.step({b: _rows(1, 2)})
    cache.step({b: _rows(10, 11, 12, 13, parents=[-1, 0, 0, -1], path=(0, 2))})
    assert _ids(cache, b) == [1, 2, 10, 12] and _positions(cache, b) == [0, 1, 2, 3]
    assert cache.position(b) == 4
    placed = cache.place(b, _rows(20, 21, 22, parents=[-1, -1, 1]))
    assert [t.position for t in placed] == [4, 4, 5]


def test_a_join_counts_shared_tokens_once_and_keeps_the_order() -> None:
    cache = DeepCopyCache()
    root = cache.new_branch()
    cache.step({root: _rows(1, 2)})
    a, b = cache.fork(root, 2)
    cache.step({a: _rows(3, 4), b: _rows(5)})
    (c,) = cache.fork(a)
    cache.step({c: _rows(6)})
    cache.join(root, [c, b])
    assert _ids(cache, root) == [1, 2, 3, 4, 6, 5]
    assert _positions(cache, root) == [0, 1, 2, 3, 4, 2]
    assert cache.position(root) == 5 and sorted(cache.branches) == [root, a]
    cache.join(root, [a], "sum")
    assert _ids(cache, root) == [1, 2, 3, 4, 6, 5] and cache.position(root) == 5


def test_where_a_joined_branch_goes_on() -> None:
    for position, expected in (("max", 3), ("sum", 5), (9, 9)):
        cache = DeepCopyCache()
        root = cache.new_branch()
        cache.step({root: _rows(1)})
        children = cache.fork(root, 2)
        cache.step({children[0]: _rows(2, 3), children[1]: _rows(4, 5)})
        cache.join(root, children, position)  # type: ignore[arg-type]
        assert cache.position(root) == expected


def test_a_join_brings_back_what_the_parent_cropped() -> None:
    cache = DeepCopyCache()
    root = cache.new_branch()
    cache.step({root: _rows(1, 2, 3)})
    (child,) = cache.fork(root)
    cache.crop(root, 1)
    assert cache.position(root) == 1
    cache.join(root, [child])
    assert _ids(cache, root) == [1, 2, 3]


def test_crop_fork_at_excise_and_position() -> None:
    cache = DeepCopyCache()
    root = cache.new_branch()
    cache.step({root: _rows(1, 2, 3, 4)})
    cache.set_position(root, 10)
    cache.step({root: _rows(5)})
    cache.excise(root, 1, 3)
    assert _ids(cache, root) == [1, 4, 5] and _positions(cache, root) == [0, 3, 10]
    assert cache.position(root) == 11
    child = cache.fork_at(root, 2)
    assert _ids(cache, child) == [1, 4] and cache.position(child) == 4
    cache.crop(child, 0)
    assert cache.position(child) == 0 and _ids(cache, root) == [1, 4, 5]


def test_select_frees_every_descendant_and_lineage_survives_a_freed_branch() -> None:
    cache = DeepCopyCache()
    root, other = cache.new_branch(), cache.new_branch()
    (child,) = cache.fork(root)
    (grandchild,) = cache.fork(child)
    cache.step({grandchild: _rows(1)})
    cache.free([child])
    assert cache.descendants(root) == [grandchild]
    cache.fork(grandchild, 2)
    cache.select(root, grandchild)
    assert sorted(cache.branches) == [root, other] and _ids(cache, root) == [1]


def test_reorder_reads_all_sources_first() -> None:
    cache = DeepCopyCache()
    beams = [cache.new_branch() for _ in range(3)]
    cache.step({b: _rows(b) for b in beams})
    cache.reorder(beams, [1, 0, 1])
    assert [_ids(cache, b) for b in beams] == [[1], [0], [1]]


def test_attend_is_attention_over_the_context_and_the_branch_s_own_rows() -> None:
    cache = DeepCopyCache()

    def token(identity: int, key: float, value: float) -> Token:
        kv = torch.full((1, 1), key), torch.full((1, 1), value)
        return Token(identity, 0, [kv])

    a = cache.new_branch()
    cache.step({a: Rows([token(1, 0.0, 2.0)])})
    (b,) = cache.fork(a)
    rows = {a: Rows([token(2, 0.0, 4.0), token(3, 0.0, 6.0)]), b: Rows([token(4, 0.0, 8.0)])}
    out, lse = cache.attend(rows, 0, _ones(3, 1, 1), softmax_scale=1.0)
    assert out.flatten().tolist() == pytest.approx([3.0, 4.0, 5.0])
    assert lse.flatten().tolist() == pytest.approx([math.log(2), math.log(3), math.log(2)])
