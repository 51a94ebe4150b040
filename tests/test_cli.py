"""The command `fork-attn`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fork_attn
from fork_attn import _C, cli, demo

H200 = {
    "name": "NVIDIA H200",
    "capability": (9, 0),
    "multiprocessors": 132,
    "memory_bytes": 141 * 2**30,
    "binary_version": 90,
}


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def with_devices(monkeypatch: pytest.MonkeyPatch, *devices: dict[str, object], reason: str) -> None:
    """What the extension reports on another machine."""
    found = {
        "built": True,
        "architectures": "80-real 90a-real",
        "runtime_version": 13000,
        "driver_version": 13000 if devices else 0,
        "devices": [dict(device) for device in devices],
        "reason": reason,
    }
    monkeypatch.setattr(_C, "cuda_info", lambda: found)


def test_info_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys, "info")
    assert f"fork-attn           {fork_attn.__version__}\n" in text
    assert "backend cpu         available" in text
    assert str(Path(_C.__file__)) in text


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(report(capsys, "info", "--json"))
    assert found["versions"]["fork-attn"] == fork_attn.__version__
    assert found["extension"]["cxx_standard"] >= 202002
    assert found["extension"]["openmp"] > 0
    assert found["extension"]["simd"] in ("baseline", "avx2", "avx512")
    assert found["backends"]["cpu"] == "available"
    assert found["backends"]["cuda"].startswith("not part of this version")
    if not found["torch_cuda"]["available"]:
        assert "expected a CUDA device" in found["backends"]["triton"]
        assert found["backends"]["flash_attn"] != "available"
    # Either there are devices, or the reason why not is given.
    assert bool(found["cuda"]["devices"]) != bool(found["cuda"]["reason"])


def test_info_shows_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {**H200, "name": "Tesla V100", "capability": (7, 0), "binary_version": 0}
    with_devices(monkeypatch, H200, old, reason="")
    text = report(capsys, "info")
    assert "GPU 0               NVIDIA H200, sm_90, 132 SMs, 141 GiB, runs sm_90 code" in text
    assert "GPU 1               Tesla V100, sm_70" in text
    assert "this build has no code for it" in text
    assert json.loads(report(capsys, "info", "--json"))["cuda"]["devices"][0]["capability"] == [
        9,
        0,
    ]


def test_info_says_why_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, reason="no CUDA driver on this machine")
    assert "GPU                 none: no CUDA driver on this machine" in report(capsys, "info")


def test_demo_gets_its_arguments_and_gives_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 3

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo", "--prompt", "Why?"]) == 3
    assert seen[0].prompt == "Why?"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"], ["demo", "extra"]])
def test_bad_arguments_end_with_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: fork-attn" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["demo", "--help"]])
def test_help_everywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    assert "usage: fork-attn" in capsys.readouterr().out


def test_module_and_command_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fork_attn", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"fork-attn {fork_attn.__version__}\n")
