"""Triton kernels of fork-attn, installed as `fork_attn.kernels`.

The folder above has no `__init__.py` on purpose: a top-level package called `kernels` would shadow
Hugging Face's library of that name. The package itself imports nothing, so that importing it never
loads Triton; each kernel lives in a module of its own.
"""
