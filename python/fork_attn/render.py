"""A cache's branches as a tree of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fork_attn.branch import Branch
    from fork_attn.cache import ForkedKVCache


def render_cache(cache: ForkedKVCache) -> str:
    """One line for the pool, then one per live branch, indented below the branch that it was forked
    from."""
    s = cache.stats()
    lines = [
        f"{s.pages_live}/{s.pages_total} pages of {cache.page_size} live, {s.pages_shared} shared, "
        f"{s.kv_bytes / 2**20:.1f} MiB of KV, {s.branches} branches"
    ]
    children: dict[int, list[Branch]] = {}
    for branch in cache.branches:
        children.setdefault(cache._core.parent_id(branch._handle), []).append(branch)
    stack = [(branch, "", True) for branch in reversed(children.get(-1, []))]
    while stack:
        branch, indent, is_root = stack.pop()
        below = children.get(branch.id, [])
        lines.append(
            f"{indent}branch {branch.id}: {branch.length} tokens on {branch.num_pages} pages, "
            f"next position {branch.position}{_watches(branch)}"
        )
        base = indent.replace("├─ ", "│  ").replace("└─ ", "   ") if not is_root else ""
        for i, child in reversed(list(enumerate(below))):
            stack.append((child, base + ("└─ " if i == len(below) - 1 else "├─ "), False))
    return "\n".join(lines)


def _watches(branch: Branch) -> str:
    watched = branch.cache._core.watched(branch._handle)
    names = ["one that was freed" if i < 0 else str(i) for i in watched]
    return f", watches {' and '.join(names)}" if names else ""
