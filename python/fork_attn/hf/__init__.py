"""Forked KV caches for Hugging Face transformers models.

`attach` gives a model a `ForkedKVCache`; `forward` and `join` run and merge branches; `ForkCache`
lets plain `model.generate` decode over it.
"""

from __future__ import annotations

from fork_attn.hf.attach import attach
from fork_attn.hf.decode_graph import DecodeGraph
from fork_attn.hf.fork_cache import ForkCache
from fork_attn.hf.forward import forward, join

__all__ = ["DecodeGraph", "ForkCache", "attach", "forward", "join"]
