"""`fork-attn plan`: the notation, the figures, the picture, its errors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fork_attn import cli
from fork_attn.plan_format import sections
from fork_attn.plan_report import (
    TreeShape,
    item_slots,
    parse_heads,
    parse_shape,
    plan_tree,
    report,
)


def test_notation() -> None:
    shape = TreeShape((1, 4, 16), (1024, 256, 0))
    assert parse_shape("[1,4,16]x[1024,256,0]") == shape
    assert parse_shape(" [1, 4, 16] × [1024, 256, 0] ") == shape
    assert parse_heads("32/8") == (32, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,256", "expected like"),
        ("[1,256]x[32]", "as many levels in both lists, got 2 and 1"),
        ("[1,,2]x[1,2,3]", "numbers between commas"),
        ("[0]x[3]", "a multiple of 1 nodes, got 0"),
        ("[2,5]x[3,3]", "a multiple of 2 nodes, got 5"),
        ("[1000000]x[3]", "at most 65536 branches"),
    ],
)
def test_wrong_shapes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"shape: expected .*{message}|shape: .*{message}"):
        parse_shape(text)


def test_every_slot_has_its_place() -> None:
    tree = plan_tree(parse_shape("[2,4,8]x[5,3,20]"), page_size=3)
    ranks = tree.rank[tree.rank >= 0]
    assert ranks.sort().values.tolist() == list(range(2 * 5 + 4 * 3 + 8 * 21))
    counts = [(tree.level == level).sum().item() for level in range(3)]
    assert counts == [2 * 5, 4 * 3, 8 * 21]
    # A branch's context is its path, each node in one piece, oldest first.
    start = tree.rank[(tree.level == 1) & (tree.node == 3)].min()
    assert start == 5 + 2 * (3 + 2 * 21) + 5 + 3 + 2 * 21


def test_report_adds_up() -> None:
    tree = plan_tree(parse_shape("[1,256]x[2048,32]"))
    figures = report(tree)
    assert figures["unique_kv_bytes"] == (2048 + 256 * 33) * 8 * 256 * 2
    assert figures["flops"] == 256 * 2081 * 32 * 512
    read = sum(r["slots"] for block in figures["blocks"] for r in block["reads"])
    assert read * 8 * 256 * 2 == figures["read_kv_bytes"]
    assert len(figures["blocks"]) == figures["row_blocks"] == 8
    assert figures["predicted_us"] >= figures["mean_worker_us"]
    assert figures["predicted_us"] > figures["memory_floor_us"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--heads", "8/1", "--dim", "64", "--dtype", "fp32", "--page-size", "64"]
    options += ["--target", "sm_80", "--workers", "3", "--window", "100", "--json"]
    status, out, err = run(capsys, "[1,8]x[4000,32]", *options)
    figures = json.loads(out)
    assert (status, err) == (0, "")
    assert figures["heads"] == [8, 1]
    assert figures["head_dim"] == 64
    assert figures["page_size"] == 64
    assert figures["target"] == "sm_80"
    assert figures["workers"] == 3
    assert figures["window"] == 100
    assert figures["unique_kv_bytes"] == (67 + 8 * 33) * 128 * 4


@pytest.mark.parametrize("rich", [True, False])
def test_text(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "200")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    status, out, _ = run(capsys, "[1,4,16,64]x[1024,256,128,32]", "--workers", "7")
    assert status == 0
    assert re.search(r"target +sm_90, 7 workers", out)
    assert re.search(r"balance +max / mean 1\.\d+ over 7 workers", out)
    assert re.search(
        r"2 x 32 of branches 0 to 63 +level 0: 1024 slots of 1 node, "
        r"level 1: 512 slots of 2 nodes, level 2: 1024 slots of 8 nodes, "
        r"level 3: 1056 slots of 32 nodes",
        out,
    )


def test_many_row_blocks_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    figures = ["[1,2,2048]x[9000,70000,200]", "--heads", "16/1", "--workers", "132"]
    status, out, _ = run(capsys, *figures)
    assert status == 0
    assert len(out.splitlines()) < 60


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.svg"
    status, _, err = run(capsys, "[1,16]x[100,30]", "--heads", "16/1", "--plot", str(file))
    assert (status, err) == (0, "")
    svg = ElementTree.parse(file).getroot()
    tree = plan_tree(parse_shape("[1,16]x[100,30]"), heads=(16, 1))
    parts = sections(tree.plan.buffer)
    paths = svg.findall("{http://www.w3.org/2000/svg}path")
    assert len(paths) == len(tree.plan.span_ns)
    covered = sum(
        float(width) for path in paths for width in re.findall(r"h([\d.]+)v", path.get("d") or "")
    )
    reads = torch.cat([item_slots(tree.plan, parts, i) for i in range(len(parts.items))])
    assert covered == pytest.approx(len(reads) * 900 / (100 + 16 * 31), rel=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["[1,256]"], "shape: expected like"),
        (["[1]x[8]", "--heads", "7/2"], "heads: expected .* got '7/2'"),
        (["[1]x[8]", "--target", "sm_91"], "target: expected cpu, sm_80, sm_90 or sm_100"),
        (["[1]x[8]", "--workers", "0"], "num_workers: expected 1 to"),
        (["[1]x[8]", "--window", "0"], "sliding_window: expected 1 to"),
        (["[1]x[8]", "--dim", "0"], "head_dim: expected 1 to"),
        (["[1]x[8]", "--page-size", "0"], "page_size: expected 1 to"),
        (["[1]x[3000000000]"], r"num_pages: expected fewer than 2\*\*31 slots"),
        (["[1]x[8]", "--plot", "plan.png"], r"plot: expected a file that ends in .svg"),
        (["[1]x[8]", "--plot", "no/such/folder/plan.svg"], "No such file"),
    ],
)
def test_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert re.match(f"fork-attn plan: .*{message}", err)
    assert len(err.splitlines()) == 1
