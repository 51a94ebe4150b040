"""What the documents say is true: their Python runs; files, make targets and commands exist.

DESIGN.md is left out: it also describes what is not built yet.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TOP_LEVEL = ("csrc", "kernels", "python", "tests", "benchmarks", "docs", "examples", ".ci")

_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_PATH = re.compile(
    rf"(?<![\w./-])(?:{'|'.join(map(re.escape, TOP_LEVEL))})/[\w./*-]*|(?<![\w./-])[A-Z]\w+\.md"
)
_LINK = re.compile(r"\]\(([^)#\s]+)")
_MAKE = re.compile(r"(?:`|^|[A-Z]=\S+ )make ([a-z-]+)", re.MULTILINE)
_COMMAND = re.compile(r"(?:`|^)(?:fork-attn|python -m fork_attn) ([a-z]+)", re.MULTILINE)


def python_blocks(text: str) -> list[str]:
    return _PYTHON.findall(text)


def missing_paths(document: Path, text: str, root: Path = ROOT) -> list[str]:
    """Paths of the repository, and relative links, that a document names and that do not exist."""
    missing = [name for name in _PATH.findall(text) if not _exists(root, name.rstrip("."))]
    links = [name for name in _LINK.findall(_FENCE.sub("", text)) if "://" not in name]
    return missing + [name for name in links if not _exists(document.parent, name)]


def _exists(base: Path, name: str) -> bool:
    return any(base.glob(name.rstrip("/"))) if "*" in name else (base / name).exists()


def _id(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_python_blocks_run(document: Path, tmp_path: Path) -> None:
    for number, code in enumerate(python_blocks(document.read_text(encoding="utf-8"))):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"python block {number} of {_id(document)}:\n{done.stderr}"


def test_readme_shows_code() -> None:
    assert python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_named_paths_exist(document: Path) -> None:
    assert missing_paths(document, document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_named_make_targets_and_commands_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(_MAKE.findall(text))
    assert named <= targets, f"no such make target: {sorted(named - targets)}"

    commands = set(_COMMAND.findall(text))
    for command in sorted(commands):
        done = subprocess.run(
            [sys.executable, "-m", "fork_attn", command, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, f"fork-attn {command} --help:\n{done.stderr}"


def test_a_false_path_is_found(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.h").touch()
    (tmp_path / "docs").mkdir()
    text = "`csrc/a.h` csrc/*.h csrc/b.h docs/*.md see [x](docs/y.md) and CHANGES.md, https://a/csrc/z.h"
    assert missing_paths(tmp_path / "README.md", text, tmp_path) == [
        "csrc/b.h",
        "docs/*.md",
        "docs/y.md",
        "CHANGES.md",
        "docs/y.md",
    ]
    assert python_blocks("```python\nx = 1\n```\n```bash\ny\n```\n") == ["x = 1\n"]
