"""What is built and shipped: sdist, wheel, a light import, and honest errors of the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(
    *command: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def checked(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = run(*command, cwd=cwd, env=env)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked. It is made from a copy, for setuptools writes beside setup.py."""
    tree = tmp_path_factory.mktemp("tree") / "fork-attn"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    (tree / "python" / "fork_attn" / "_C.stale.so").touch()  # an in-place build must not be shipped
    out = tmp_path_factory.mktemp("sdist")
    checked(sys.executable, "setup.py", "-q", "sdist", "-d", str(out), cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    (folder,) = (p for p in out.iterdir() if p.is_dir())
    return folder


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, so that the sdist is known to be whole."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q")
    options = ("--no-build-isolation", "--no-deps", "-w", str(out))
    checked(*pip, *options, str(sdist), env={**os.environ, "FORK_ATTN_CUDA": "OFF"})
    (path,) = out.glob("fork_attn-*.whl")
    return path


def sources(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}


def test_sdist_holds_the_sources_and_no_build(sdist: Path) -> None:
    files = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    for folder in ("csrc", "kernels", "python", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".typed"):
                assert path.relative_to(ROOT).as_posix() in files
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= files
    assert not [name for name in files if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    expected = {f"fork_attn/{name}" for name in sources(ROOT / "python" / "fork_attn")}
    kernels = sources(ROOT / "kernels" / "fork_attn_triton")
    expected |= {f"fork_attn/kernels/{name}" for name in kernels}
    expected |= {f"fork_attn/bench/{name}" for name in sources(ROOT / "benchmarks" / "suite")}
    expected |= {"fork_attn/py.typed", "fork_attn/_C.pyi"}
    assert {n for n in names if n.endswith((".py", ".pyi", ".typed"))} == expected
    modules = [n for n in names if n.endswith(".so")]
    assert len(modules) == 1 and modules[0].startswith("fork_attn/_C."), modules
    assert any(n.endswith("/LICENSE") for n in names)
    assert "License: Apache-2.0" in text
    assert "fork-attn = fork_attn.cli:main" in entry_points
    # Torch of any version serves the one wheel: it is required, never linked.
    assert re.search(r"^Requires-Dist: torch>=", text, re.MULTILINE)


def test_the_module_links_neither_torch_nor_cuda(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("no ldd on this machine")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".so"))
        linked = checked("ldd", archive.extract(name, tmp_path))
    names = re.findall(r"^\s*(\S+)", linked, re.MULTILINE)  # addresses after them may spell c10
    assert names and not [n for n in names if re.search(r"torch|c10|libcuda|libpython", n)], linked


def test_the_wheel_imports_in_a_fresh_process(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, fork_attn, fork_attn.kernels\n"
        "print(fork_attn.__file__, fork_attn._C.__file__, fork_attn.kernels.__file__)\n"
        "heavy = {'triton', 'transformers', 'fork_attn.hf', 'fork_attn.demo'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(fork_attn.__version__, fork_attn._C.cuda_info()['built'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    files, heavy, built = checked(sys.executable, "-c", code, cwd=tmp_path, env=env).splitlines()
    assert all(name.startswith(str(tmp_path)) for name in files.split())
    assert heavy == "[]"
    assert built.split()[1] == "False" and built.split()[0] in wheel.name


def test_import_and_help_stay_light() -> None:
    """Neither import nor help needs Triton, transformers or a plotting library."""
    code = (
        "import sys\n"
        "from fork_attn import cli\n"
        "try:\n    cli.main(['demo', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'triton', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    assert checked(sys.executable, "-c", code).splitlines()[-1] == "[]"


def test_huggingface_kernels_is_not_shadowed() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


# --- the build's options


def configure(
    tmp_path: Path, env: dict[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    import pybind11

    return run(
        *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build")),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *options,
        env=env,
    )


def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """The environment with no nvcc to be found, and every other tool in its place."""
    tools = tmp_path / "tools"
    tools.mkdir()
    search = [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]
    kept = [folder for folder in search if not (Path(folder) / "nvcc").exists()]
    for name in ("cmake", "ninja", "cc", "c++", "gcc", "g++", "ld", "as", "ar", "ranlib"):
        found = shutil.which(name, path=os.pathsep.join(search))
        if found and shutil.which(name, path=os.pathsep.join(kept)) is None:
            (tools / name).symlink_to(found)
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    return {**env, "PATH": os.pathsep.join([str(tools), *kept])}


def test_cuda_on_without_nvcc_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = configure(tmp_path, without_nvcc(tmp_path), "-DFORK_ATTN_CUDA=ON")
    assert done.returncode != 0
    assert "FORK_ATTN_CUDA=ON needs the CUDA compiler, and nvcc was not found" in done.stderr


def test_cuda_auto_without_nvcc_builds_for_the_cpu(tmp_path: Path) -> None:
    done = configure(tmp_path, without_nvcc(tmp_path), "-DFORK_ATTN_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert "fork_attn: CUDA OFF" in done.stdout


def test_cuda_option_takes_only_its_values(tmp_path: Path) -> None:
    done = configure(tmp_path, dict(os.environ), "-DFORK_ATTN_CUDA=YES")
    assert done.returncode != 0
    assert "FORK_ATTN_CUDA: expected AUTO, ON or OFF, got 'YES'" in done.stderr


# --- one version of everything


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"([A-Za-z][\w-]*)==([\w.]+)", text))


def test_hooks_use_the_pinned_tools() -> None:
    hooks = pins((ROOT / ".pre-commit-config.yaml").read_text())
    constraints = pins((ROOT / "constraints.txt").read_text())
    assert {n: v for n, v in hooks.items() if n != "pre-commit-hooks"} == {
        n: constraints[n] for n in ("ruff", "clang-format")
    }


def test_changelog_names_the_version() -> None:
    init = (ROOT / "python" / "fork_attn" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', init, re.MULTILINE)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
