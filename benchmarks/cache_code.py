"""Registers and instructions of the cache's GPU kernels, written into docs/kernels/cache.md.

    python benchmarks/cache_code.py

Needs nvcc and Triton's disassembler, and no GPU.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from fork_attn.testing import sass

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "kernels" / "cache.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table() -> str:
    """The kernels as rows of Markdown: registers / instructions for each architecture."""
    code: dict[str, dict[str, sass.KernelCode]] = {}
    with tempfile.TemporaryDirectory() as workdir:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for arch in sass.ARCHS:
                for kernel in sass.compile_kernels(source, ROOT / "csrc", arch, Path(workdir)):
                    code.setdefault(kernel.name, {})[arch] = kernel
    code.pop("probe()", None)
    lines = [
        f"| kernel | {' | '.join(sass.ARCHS)} | 16-byte loads, stores |",
        f"|---|{'---:|' * len(sass.ARCHS)}---:|",
    ]
    for name, by_arch in sorted(code.items()):
        cells = [f"{by_arch[a].registers} / {by_arch[a].instructions}" for a in sass.ARCHS]
        hopper = by_arch["sm_90a"]
        wide = f"{hopper.wide_loads}, {hopper.wide_stores}"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {wide} |")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = version.stdout.split("release ")[1].split(",")[0]
    return f"nvcc {release}, registers / instructions:\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    missing = sass.tools_missing()
    if missing is not None:
        raise SystemExit(missing)
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOC.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
