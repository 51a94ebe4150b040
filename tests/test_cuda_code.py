"""The device code of csrc/cuda as nvcc compiles it: every target compiles, no kernel spills, those for
aligned data load and store 16 bytes at a time. No GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fork_attn.testing import sass

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
DOC = ROOT / "docs" / "kernels" / "cache.md"

MAX_REGISTERS = 96  # two blocks of 256 threads on every multiprocessor, with room
missing = sass.tools_missing()
needs_nvcc = pytest.mark.skipif(missing is not None, reason=missing or "")

Key = tuple[str, str]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, sass.KernelCode]:
    """Every kernel by architecture and name."""
    workdir = tmp_path_factory.mktemp("cubins")
    return {
        (arch, kernel.name): kernel
        for arch in sass.ARCHS
        for source in SOURCES
        for kernel in sass.compile_kernels(source, ROOT / "csrc", arch, workdir)
    }


def aligned(name: str) -> bool:
    """Whether a kernel is the one for aligned data of its types."""
    return "Vector16" in name or re.search(r"<(4|8|16),", name) is not None


@needs_nvcc
def test_no_kernel_uses_local_memory(code: dict[Key, sass.KernelCode]) -> None:
    bad = [key for key, kernel in code.items() if kernel.stack or kernel.spills]
    assert not bad


@needs_nvcc
def test_registers_leave_room_for_two_blocks(code: dict[Key, sass.KernelCode]) -> None:
    assert {key: k.registers for key, k in code.items() if k.registers > MAX_REGISTERS} == {}


@needs_nvcc
def test_aligned_kernels_move_16_bytes_at_a_time(code: dict[Key, sass.KernelCode]) -> None:
    checked = 0
    for (arch, name), kernel in code.items():
        if not aligned(name):
            continue
        checked += 1
        assert kernel.wide_loads and kernel.wide_stores, (arch, name)
        # The rest are scalars: slots, positions, scales, log-sum-exps.
        narrow = kernel.count(r"STG") - kernel.wide_stores
        assert narrow <= (1 if name.startswith("merge") else 0), (arch, name)
    assert checked >= 3 * 16


@needs_nvcc
def test_every_kernel_has_a_form_for_aligned_data(code: dict[Key, sass.KernelCode]) -> None:
    kernels = {re.split("[<(]", name)[0] for _, name in code} - {"probe"}
    assert kernels == {re.split("[<(]", name)[0] for _, name in code if aligned(name)}
    assert len(kernels) == 6


@needs_nvcc
def test_hopper_and_later_convert_e4m3_in_hardware(code: dict[Key, sass.KernelCode]) -> None:
    for arch in ("sm_90a", "sm_100"):
        store = code[arch, "store_kernel<16, Float8E4M3, BFloat16>"]
        assert store.count("F2FP") >= 32


@needs_nvcc
def test_the_table_of_the_document_names_every_kernel(code: dict[Key, sass.KernelCode]) -> None:
    """Figures depend on nvcc's version and are not compared; names do not."""
    text = DOC.read_text(encoding="utf-8")
    assert {name for _, name in code if f"`{name}`" not in text} - {"probe()"} == set()
