"""A GPU machine as far as benchmarks/gpu/run.sh sees one: programs that write down their calls and
leave the files that the real ones would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("run.sh", "parts.sh", "measured.py")
TEST_FILE = '<testsuites><testsuite><testcase classname="tests.gpu.test_a" name="b"/></testsuite>'
GOOD = {
    "baseline": {"roofs": {"copy_b": 3e12}, "dense_attention": [{"absent": {}}]},
    "cache_kernels": {"cases": [1]},
    "costs": {"costs": {"a": 1}, "measured": [1], "fit": {"median_error": 0.1}},
    "sweep": {"cases": [{"bodies": [{"seconds_memory": 1.0}]}]},
    "suite": {
        "cases_planned": 1,
        "cases": [{"id": "S1", "ways": {"ours": {"ours": True, "step": {}}}, "absent": {}}],
        "not_reached": [],
        "failed": [],
    },
    "end_to_end": {"model": "m", "cells": [{"ways": {"fork_attn": {}}}], "continuous": {}},
}

# What stands for python: argv[1:] as python gets them.
PROGRAM = """#!{python} -S
import json, os, pathlib, subprocess, sys
here, arguments = pathlib.Path({folder!r}), sys.argv[1:]
text = " ".join(arguments)
good, bad = json.loads((here / "good.json").read_text()), here / "bad.json"
after = lambda option: pathlib.Path(arguments[arguments.index(option) + 1])
if "measured.py" in text or arguments[0] == "-":
    sys.exit(subprocess.run([sys.executable, "-S", *arguments]).returncode)
kept = ("FORK_ATTN_COSTS", "FORK_ATTN_CUDA", "FORK_ATTN_CUDA_ARCHS", "COMMIT", "PATH")
with (here / "calls").open("a") as file:
    file.write(json.dumps([text, {{k: os.environ.get(k) for k in kept}}]) + "\\n")
for part, status in json.loads(bad.read_text()).items() if bad.exists() else ():
    if part in text and (part != "pip" or os.environ["FORK_ATTN_CUDA"] == "ON"):
        sys.exit(status)
if "get_device_name" in text:
    print("nvidia-test")
elif "get_device_capability" in text:
    print("90a-real")
elif "__file__" in text:
    print(here / "installed" / ".sources")
elif "fork_attn info" in text:
    print("costs sm_90 " + os.environ.get("FORK_ATTN_COSTS", "datasheet"))
elif "-m pytest" in text:
    xml = next(a for a in arguments if a.startswith("--junitxml=")).partition("=")[2]
    pathlib.Path(xml).write_text({xml!r} + "</testsuites>")
elif "baseline.py" in text:
    after("--json").write_text(json.dumps(good["baseline"]))
elif "cache_kernels.py" in text:
    held = json.loads(after("--json").read_text())
    after("--json").write_text(json.dumps(held | {{"cache_kernels": good["cache_kernels"]}}))
elif "calibrate" in text:
    after("--out").write_text(json.dumps(good["costs"]))
elif "sweep.py" in text:
    (after("--out") / "sweep.json").write_text(json.dumps(good["sweep"]))
elif "fork_attn bench" in text:
    suite = json.loads(after("--json").read_text()) if after("--json").exists() else good["suite"]
    suite["not_reached"] = suite.get("not_reached", [])[1:]
    after("--json").write_text(json.dumps(suite))
elif "roofline.py" in text:
    pathlib.Path(arguments[-1]).write_text("<svg/>")
elif "end_to_end.py" in text:
    after("--json").write_text(json.dumps(good["end_to_end"]))
"""


@dataclass
class Call:
    """A call of a program, and what it had of the environment."""

    text: str
    environ: dict[str, str | None]


@dataclass
class GpuMachine:
    """A checkout in `folder` with scripts of ours, and sources that stand for ours."""

    folder: Path
    good: dict[str, object] = field(default_factory=lambda: dict(GOOD))
    bad: dict[str, int] = field(default_factory=dict)
    """Exit statuses of calls that hold a text; "pip" only with device code."""

    def __post_init__(self) -> None:
        self.tree, self.out = self.folder / "tree", self.folder / "out"
        for name in ("csrc", "python", "kernels", "tests", "benchmarks/gpu"):
            (self.tree / name).mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(ROOT / "benchmarks/gpu" / name, self.tree / "benchmarks/gpu")
        for name in ("csrc/a.cu", "setup.py", "pyproject.toml", "CMakeLists.txt"):
            (self.tree / name).write_text("one")
        (self.folder / "installed").mkdir()
        self.cuda = self.folder / "cuda"
        (self.cuda / "bin").mkdir(parents=True)
        self._program(self.folder / "python")
        self._program(self.cuda / "bin/compute-sanitizer")

    def _program(self, path: Path) -> None:
        text = PROGRAM.format(python=sys.executable, folder=str(self.folder), xml=TEST_FILE)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, part: str, fresh: bool = True, **environ: str) -> tuple[int, str, list[Call]]:
        """Status, output and calls of a part; `fresh`: into an empty folder, as each call there."""
        if fresh:
            shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(exist_ok=True)
        (self.folder / "good.json").write_text(json.dumps(self.good))
        (self.folder / "bad.json").write_text(json.dumps(self.bad))
        (self.folder / "calls").unlink(missing_ok=True)
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        given = {"PATH": path, "OUT": str(self.out), "PYTHON": str(self.folder / "python")}
        done = subprocess.run(
            ["bash", "benchmarks/gpu/run.sh", part],
            cwd=self.tree,
            env=given | {"CUDA_HOME": str(self.cuda), "HOME": os.environ["HOME"]} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout, [Call(*json.loads(line)) for line in lines]


def states(output: str) -> dict[str, str]:
    """Part to state, from the summary."""
    found = {}
    for line in output.partition("=== summary")[2].splitlines()[1:]:
        if line.endswith(" s") and not line.startswith(" "):
            found[line.split()[0]] = " ".join(line.split()[1:-2])
    return found
