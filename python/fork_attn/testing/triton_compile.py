"""Compiles a Triton kernel for a GPU that is not there, and reads what came out.

TRITON_INTERPRET must not be set when the kernel's module is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPERATION = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE
)


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel, and how many instructions of a kind it has."""

    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per program
    instructions: int
    spills: int  # local loads and stores
    loop_spills: tuple[int, ...]  # of these, in each basic block with products: the inner loops
    hgmma: int  # warpgroup products; like the next two, without functions that are called
    hmma: int  # warp products of 16-bit elements
    tcgen05: int
    product_waits: int  # for warpgroup products
    tma_loads: int
    wide_loads: int  # 128 bits to registers or, asynchronously, to shared memory
    atomics: int
    ptx: str
    ttgir: str  # with every tensor's layout

    @property
    def hot_spills(self) -> int:
        """Local loads and stores in the inner loops."""
        return sum(self.loop_spills)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    *,
    aligned: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    fuse: bool = True,
    debug: bool = False,
) -> Compiled:
    """Compiles `kernel` for sm_`arch`.

    Args:
        kernel: a `triton.jit` function.
        signature: the type of every parameter by name, in order: "*bf16", "i32", "fp32",
            "tensordesc<bf16[64, 128]>", "constexpr".
        constants: the values of the constexpr parameters.
        arch: 80, 90 or 100.
        aligned: parameters that are divisible by 16, as the JIT would see.
        num_warps, num_stages, debug: as in a launch; `fuse` is its enable_fp_fusion.
    """
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(
        fn=kernel, signature=dict(signature), constexprs=dict(constants), attrs=attributes
    )
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": fuse,
        "debug": debug,
    }
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(result.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", file)
        sass = _run("nvdisasm", "-c", file)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    kernel = re.split(r"^\$\w", sass, maxsplit=1, flags=re.MULTILINE)[0]  # functions follow it
    everything, own = _OPERATION.findall(sass), _OPERATION.findall(kernel)

    def count(pattern: str, operations: list[str] = everything) -> int:
        return sum(bool(re.match(pattern, operation)) for operation in operations)

    return Compiled(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=result.metadata.shared,
        instructions=len(everything),
        spills=count("LDL|STL"),
        loop_spills=_loop_spills(kernel),
        hgmma=count("HGMMA", own),
        hmma=count("HMMA", own),
        tcgen05=count(r"UTC.*MMA", own),
        product_waits=count(r"WARPGROUP\.DEPBAR", own),
        tma_loads=count("UTMALDG|UBLKCP"),
        wide_loads=count(r"LDG\.E(\.\w+)*\.128|LDGSTS.*128"),
        atomics=count("ATOM"),
        ptx=result.asm["ptx"],
        ttgir=result.asm["ttgir"],
    )


def _loop_spills(sass: str) -> tuple[int, ...]:
    spills = []
    for block in re.split(r"^\.L_x_\d+:", sass, flags=re.MULTILINE):
        operations = _OPERATION.findall(block)
        products = sum(bool(re.match(r"HG?MMA|UTC.*MMA", x)) for x in operations)
        if products or operations.count("FFMA") > 500:
            spills.append(sum(bool(re.match("LDL|STL", x)) for x in operations))
    return tuple(spills)


def _run(tool: str, *arguments: object) -> str:
    command = [str(_TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
