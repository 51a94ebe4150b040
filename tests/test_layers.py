"""Imports go one way, and the build knows nothing of Torch: DESIGN.md, section 3.

The sources are read, not imported, so that a bad arrow fails here whatever it does at run time.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own line and the lines above it. Subpackages count as their package.
LAYERS = (
    ("errors", "_env", "_C"),
    ("checks", "devices"),
    ("kv_library",),
    ("kv_checks", "quantise", "costs"),
    ("plan", "plan_format", "rope"),
    ("layers", "storage", "streams", "staging", "scrub", "rotation_buffers"),
    ("kernels",),
    ("ops_cache", "ops_triton", "ops_flash"),
    ("ops", "reference", "reference_cache"),
    ("render", "branch", "books", "device_step", "step", "cache", "plan_buffers"),
    ("",),  # fork_attn/__init__.py, the public names
    ("hf",),
    ("reason",),
    ("demo", "plan_report", "plan_picture", "plan_command", "reason_command", "bench", "calibrate"),
    ("cli", "__main__"),
    ("testing",),  # for tests alone
)
LAYER_OF = {name: index for index, names in enumerate(LAYERS) for name in names}

ORACLES = ("reference", "reference_cache")

# Third parties that only these may import.
RESTRICTED = {
    "triton": ("kernels", "testing"),
    "transformers": ("hf", "reason", "demo", "reason_command"),
    "rich": ("reason", "demo", "plan_command", "reason_command", "calibrate"),
    "matplotlib": ("demo", "reason"),
}


@dataclass(frozen=True)
class Import:
    where: str  # file:line
    module: str  # full dotted name
    lazy: bool  # inside a function


def _name(path: Path, package: Path) -> str:
    """The dotted name of a file relative to its package, "" for the package itself."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, module: str) -> Iterator[Import]:
    """Every import of a file, as absolute names; `from fork_attn import x` names fork_attn.x."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = f"{path.name}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                yield from (Import(where, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, base] if base else above)
                if base == "fork_attn":
                    yield from (Import(where, f"{base}.{a.name}", lazy) for a in child.names)
                else:
                    yield Import(where, base, lazy)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def violations(package: Path, **elsewhere: Path) -> list[str]:
    """What is wrong with the imports of a package tree laid out like ours; empty if nothing.
    `elsewhere` are folders that are installed inside the package, by the name they have there."""
    modules = {_name(p, package): p for p in sorted(package.rglob("*.py"))}
    for inside, folder in elsewhere.items():
        for path in sorted(folder.rglob("*.py")):
            modules[".".join(filter(None, [inside, _name(path, folder)]))] = path
    top_level = {name.split(".")[0] for name in modules} | {"_C"}
    wrong = [f"{name}: not in LAYERS" for name in sorted(top_level) if name not in LAYER_OF]

    for name, path in modules.items():
        own = name.split(".")[0]
        for item in _imports(path, ".".join(filter(None, ["fork_attn", name]))):
            root, _, rest = item.module.partition(".")
            if root == "fork_attn":
                # A name that is no module is one of the public names of fork_attn/__init__.py.
                other = rest.split(".")[0] if rest.split(".")[0] in top_level else ""
                wrong += _arrow(own, other, item)
            elif root in RESTRICTED and own not in RESTRICTED[root]:
                wrong.append(f"{item.where}: {own} imports {root}: only {RESTRICTED[root]} may")
    return wrong


def _arrow(own: str, other: str, item: Import) -> list[str]:
    if own not in LAYER_OF or other not in LAYER_OF:
        return []  # reported by name already
    shown = f"{item.where}: {own or '__init__'} imports {other or '__init__'}"
    if LAYER_OF[other] > LAYER_OF[own]:
        return [f"{shown}: the arrow runs back"]
    if other in ORACLES and own not in ORACLES and not (own == "ops" and item.lazy):
        return [f"{shown}: only ops may, inside a function: optimised code never uses the oracle"]
    if own in ORACLES and other in ("_C", "kernels", "ops"):
        return [f"{shown}: the oracle is never another of our kernels"]
    return []


def test_imports_go_one_way() -> None:
    folders = {"kernels": ROOT / "kernels/fork_attn_triton", "bench": ROOT / "benchmarks/suite"}
    assert violations(ROOT / "python" / "fork_attn", **folders) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("plan.py", "from fork_attn.cache import ForkedKVCache", "the arrow runs back"),
        ("plan.py", "from fork_attn import Branch", "the arrow runs back"),
        ("plan.py", "from . import cache", "the arrow runs back"),
        ("plan.py", "def f():\n    import fork_attn.hf.attach", "the arrow runs back"),
        ("cache.py", "from .hf.attach import attach", "the arrow runs back"),
        ("hf/__init__.py", "from ..cli import main", "the arrow runs back"),
        ("kernels/x.py", "from fork_attn import ops", "the arrow runs back"),
        ("cache.py", "def f():\n    from fork_attn import reference", "only ops may"),
        ("ops.py", "from fork_attn import reference", "only ops may"),
        ("reference.py", "from fork_attn import ops", "never another of our kernels"),
        ("cache.py", "import transformers.cache_utils", "imports transformers"),
        ("ops.py", "import triton", "imports triton"),
        ("surprise.py", "", "surprise: not in LAYERS"),
    ],
)
def test_a_bad_arrow_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    good = {
        "__init__.py": "from fork_attn.cache import ForkedKVCache",
        "cache.py": "import torch\nfrom fork_attn import _C, plan",
        "plan.py": "from fork_attn.errors import ForkAttnError",
        "errors.py": "",
        "reference.py": "from fork_attn.plan import Plan",
        "ops.py": "def f():\n    from fork_attn import reference",
        "hf/__init__.py": "import transformers\nfrom fork_attn import Plan\nfrom . import attach",
        "hf/attach.py": "from fork_attn.cache import ForkedKVCache",
        "cli.py": "import fork_attn\nfrom fork_attn import hf",
        "kernels/__init__.py": "",
        "kernels/x.py": "import triton\nfrom fork_attn import plan",
    }

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / ("" if name.startswith("kernels/") else "fork_attn") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write(good)
    assert violations(tmp_path / "fork_attn", kernels=tmp_path / "kernels") == []
    write({file: source})
    found = violations(tmp_path / "fork_attn", kernels=tmp_path / "kernels")
    assert len(found) == 1 and complaint in found[0], found


# --- C++: what each folder of csrc may include of the others

MAY_INCLUDE = {
    "core": ("core",),
    "cpu": ("core", "cpu"),
    "cuda": ("core", "cpu", "cuda"),
    "bindings": ("core", "cpu", "cuda", "bindings"),
}
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
_FORBIDDEN = re.compile(r"^(torch|ATen|c10|numpy|Python\.h)")


def include_violations(csrc: Path) -> list[str]:
    wrong = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        inside = path.relative_to(csrc)
        folder = inside.parts[0] if len(inside.parts) > 1 else "bindings"  # csrc/bindings.cpp
        if folder not in MAY_INCLUDE:
            wrong.append(f"{inside}: csrc/{folder} is not in MAY_INCLUDE")
            continue
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            if _FORBIDDEN.match(name):
                wrong.append(f"{inside} includes {name}: the extension is free of Torch and NumPy")
            elif name.startswith("pybind11") and folder != "bindings":
                wrong.append(f"{inside} includes {name}: only the bindings know Python")
            elif name.startswith("cuda") and "/" not in name and folder != "cuda":
                wrong.append(f"{inside} includes {name}: only csrc/cuda knows CUDA")
            else:
                wrong += _include_arrow(csrc, path, folder, name)
    return wrong


def _include_arrow(csrc: Path, path: Path, folder: str, name: str) -> list[str]:
    for base in (path.parent, csrc):
        target = (base / name).resolve()
        if target.is_file() and target.is_relative_to(csrc.resolve()):
            other = target.relative_to(csrc.resolve()).parts[0]
            if other not in MAY_INCLUDE[folder]:
                return [f"{path.relative_to(csrc)} includes {name}: the arrow runs back"]
            return []
    return []


def test_includes_go_one_way() -> None:
    assert include_violations(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("file", "include", "complaint"),
    [
        ("core/a.h", '"../cpu/k.h"', "the arrow runs back"),
        ("core/a.h", '"cpu/k.h"', "the arrow runs back"),
        ("cpu/k.h", "<torch/extension.h>", "free of Torch"),
        ("core/a.h", "<pybind11/pybind11.h>", "only the bindings"),
        ("cpu/k.h", "<cuda_runtime.h>", "only csrc/cuda"),
    ],
)
def test_a_bad_include_is_found(tmp_path: Path, file: str, include: str, complaint: str) -> None:
    files = {
        "core/a.h": "#include <vector>",
        "cpu/k.h": '#include "core/a.h"',
        "bindings.cpp": '#include <pybind11/stl.h>\n#include "cpu/k.h"',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert include_violations(tmp_path) == []
    (tmp_path / file).write_text(f"#include {include}")
    found = include_violations(tmp_path)
    assert len(found) == 1 and complaint in found[0], found
