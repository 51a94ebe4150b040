"""Builds fork_attn._C with CMake. Metadata is in pyproject.toml, compiler flags in CMakeLists.txt.

Environment: `FORK_ATTN_CUDA` = AUTO (default), ON or OFF; `FORK_ATTN_CUDA_ARCHS`, CMake's list of
GPU architectures; `MAX_JOBS`, compiler processes at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Triton kernels and the benchmark suite live outside python/ and are installed inside the package.
PACKAGE_DIR = {
    "fork_attn": "python/fork_attn",
    "fork_attn.bench": "benchmarks/suite",
    "fork_attn.kernels": "kernels/fork_attn_triton",
}


def version() -> str:
    text = (ROOT / "python" / "fork_attn" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__\s*(?::\s*str\s*)?=\s*"([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('python/fork_attn/__init__.py has no line __version__ = "..."')
    return match.group(1)


def packages() -> list[str]:
    found = []
    for name, folder in PACKAGE_DIR.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return found


def tool(name: str) -> str:
    """A build tool beside this Python (a venv that is not activated) or on PATH."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=search)
    if path is None:
        raise RuntimeError(f"building fork-attn needs {name}: pip install {name}")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not build_temp: editable installs delete that, and would compile everything each time.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        arguments = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # Given anew each time: an isolated build leaves paths of a deleted folder in the cache.
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DFORK_ATTN_CUDA={os.environ.get('FORK_ATTN_CUDA') or 'AUTO'}",
        ]
        archs = os.environ.get("FORK_ATTN_CUDA_ARCHS")
        arguments.append(f"-DFORK_ATTN_CUDA_ARCHS={archs}" if archs else "-UFORK_ATTN_CUDA_ARCHS")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        cmake = tool("cmake")
        subprocess.run(
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *arguments], check=True
        )
        subprocess.run([cmake, "--build", str(build), "--target", "_C", "-j", jobs], check=True)


setup(
    version=version(),
    license="Apache-2.0",  # not in pyproject.toml: no spelling there suits old and new setuptools
    packages=packages(),
    package_dir=PACKAGE_DIR,
    ext_modules=[Extension("fork_attn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
