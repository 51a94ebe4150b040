"""What nvcc makes of a .cu file: registers, stack and machine instructions of each kernel. Needs nvcc,
and the disassembler that comes with Triton; no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ARCHS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", '-DFORK_ATTN_CUDA_ARCHS=""')


@dataclass(frozen=True)
class KernelCode:
    """One kernel's machine code on one architecture."""

    name: str  # demangled, template arguments included
    registers: int
    stack: int
    shared: int  # static shared memory in bytes
    opcodes: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions whose opcode, modifiers included, begins with a pattern."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)

    @property
    def instructions(self) -> int:
        """Instructions but for padding."""
        return len(self.opcodes) - self.count("NOP$")

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes."""
        return self.count(r"LDG\.E(\.\w+)*\.128")

    @property
    def wide_stores(self) -> int:
        """Stores of 16 bytes."""
        return self.count(r"STG\.E(\.\w+)*\.128")

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL|STL")


def tools_missing() -> str | None:
    """What of nvcc and Triton's disassembler is not on this machine, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    for name in ("cuobjdump", "nvdisasm"):
        if not _triton_tool(name).is_file():
            return f"Triton's {name} is not installed"
    return None


def compile_kernels(source: Path, include: Path, arch: str, workdir: Path) -> list[KernelCode]:
    """The kernels of a .cu file, in the order of their names.

    Raises:
        RuntimeError: nvcc or the disassembler refused; the message has their output.
    """
    cubin = workdir / f"{source.stem}.{arch}.cubin"
    _run("nvcc", *FLAGS, f"-I{include}", f"-arch={arch}", "-cubin", "-o", cubin, source)
    dump = str(_triton_tool("cuobjdump"))
    usage = _run(dump, "--dump-resource-usage", cubin)
    code = {name: body for name, body in _functions(_run(dump, "-sass", cubin))}
    kernels = []
    pattern = r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, usage):
        opcodes = re.findall(
            r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)",
            code[name],
            re.MULTILINE,
        )
        kernels.append(
            KernelCode(_short(name), int(registers), int(stack), int(shared), tuple(opcodes))
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def _functions(sass: str) -> list[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\w+)\s*$", sass, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _short(mangled: str) -> str:
    """store_kernel<8, BFloat16, BFloat16> for its mangled name."""
    full = (
        _run("c++filt", mangled).strip().split("(fork_attn", 1)[0]
        if shutil.which("c++filt")
        else ""
    )
    full = full or mangled
    full = re.sub(r"\((?:unsigned )?(?:int|long)\)", "", full)
    full = re.sub(r"^void ", "", full).replace("(anonymous namespace)::", "")
    return re.sub(r"fork_attn::(?:cuda|cpu)::", "", full)


def _triton_tool(name: str) -> Path:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return Path("triton") / name
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
