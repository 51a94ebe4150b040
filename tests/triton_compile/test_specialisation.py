"""What launches have compiled is what `benchmarks/kernel_table.py` compiles, once for all steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bodies import table
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fork_attn.kernels import launch
from fork_attn.kernels.bodies import Body

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}


class Recorder:
    """Stands for a kernel and keeps what its launches have compiled."""

    def __init__(self, kernel: Any, sm: int, inside: list[torch.device]) -> None:
        self.kernel, self.inside = kernel, inside
        self.backend = make_backend(GPUTarget("cuda", sm, 32))
        self.found: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            assert self.inside == [torch.device("cpu")], "not on the device of q"
            parameters = (self.kernel.signature, self.kernel.params, self.backend)
            bind = create_function_from_signature(*parameters)
            bound, specialisation, others = bind(*arguments, **options)
            found = self.kernel._pack_args(self.backend, others, bound, specialisation, others)
            self.found.append((*found, str(specialisation)))

        return call


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Recorder, Recorder]]:
    """Launches on the CPU as on a card of a compute capability; nothing runs."""
    inside: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def record(sm: int) -> tuple[Recorder, Recorder]:
        monkeypatch.setattr(launch, "current", current)
        monkeypatch.setattr(launch, "check_supported", lambda *_: None)
        monkeypatch.setattr(launch, "compute_capability", lambda _: sm)
        kernels = ("tree_attention_kernel", "merge_kernel")
        both = tuple(Recorder(getattr(table, name), sm, inside) for name in kernels)
        for name, recorder in zip(kernels, both, strict=True):
            monkeypatch.setattr(launch, name, recorder)
        return both  # type: ignore[return-value]

    return record


def run(case: Any, rows: int = 20, plan_at: int = 0) -> None:
    """A launch that takes the body of a case, for so many rows, its plan so many words into a
    buffer."""
    heads = table.KV_HEADS * case.group
    q = torch.zeros(rows, heads, case.dims[0], dtype=DTYPES[case.dtype])
    k, v = (
        torch.zeros(2, table.KV_HEADS, case.page_size, dim, dtype=DTYPES[case.kv_dtype])
        for dim in case.dims
    )
    out = torch.empty(rows, heads, case.dims[1], dtype=q.dtype)
    scale = None if case.kv is None else torch.ones(table.KV_HEADS)
    launch.tree_attention(
        q,
        k.transpose(1, 2),
        v.transpose(1, 2),
        torch.zeros(100, dtype=torch.int64)[plan_at:],
        torch.zeros(8, dtype=torch.int32),
        out,
        torch.empty(rows, heads),
        launch.Workspace.allocate(3, rows, heads, table.KV_HEADS, case.dims[1], q.device),
        num_programs=4,
        max_block_tokens=max(1, case.rows // case.group),
        page_size=case.page_size,
        group=case.group,
        window=9 if case.extras else 0,
        softmax_scale=0.1,
        softcap=2.0 if case.extras else 0.0,
        sinks=torch.zeros(heads) if case.extras else None,
        k_scale=scale,
        v_scale=scale,
        merge="apart" if case.apart or case.invariant else "inside",
        batch_invariant=case.invariant,
    )


@pytest.mark.parametrize("case", table.CASES, ids=lambda c: f"sm_{c.sm}-{c.rows}-{c.name}")
def test_the_table_compiles_what_launches_do(
    case: Any, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, _ = recorded(case.sm)
    run(case)
    ((options, signature, constants, attributes, _),) = attention.found
    asked: dict[str, Any] = {}

    def compile_kernel(kernel: Any, *arguments: Any, aligned: list[str], **rest: Any) -> None:
        asked.update(zip(("signature", "constants", "sm"), arguments, strict=True))
        asked.update(aligned=aligned, **rest)

    monkeypatch.setattr(table, "compile_kernel", compile_kernel)
    table.compile_case(case)
    names = list(signature)
    assert {x: _plain(t) for x, t in signature.items()} == asked["signature"]
    assert {names[at]: x for (at,), x in constants.items()} == asked["constants"]
    assert {names[at] for (at,), found in attributes.items() if found} == set(asked["aligned"])
    assert (options.num_warps, options.num_stages) == (asked["num_warps"], asked["num_stages"])
    assert options.enable_fp_fusion == asked["fuse"]


def _plain(kind: Any) -> Any:
    """A descriptor's type without the layout that is a default."""
    return kind.replace(",None", "") if isinstance(kind, str) else kind


@pytest.mark.parametrize("apart", [False, True])
def test_steps_of_any_number_of_rows_share_a_kernel(apart: bool, recorded: Any) -> None:
    """Wherever the plan lies in a step's upload."""
    both = recorded(90)
    for rows in (1, 12, 16, 33):
        for plan_at in (0, 1):
            run(table.Case(90, 16, apart=apart), rows, plan_at)
    for recorder in both[: 1 + apart]:
        assert len(recorder.found) == 8
        assert len({(str(found[0]), found[-1]) for found in recorder.found}) == 1
    assert bool(both[1].found) == apart


def test_a_body_is_launched_with_its_stages(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, _ = recorded(90)
    monkeypatch.setattr(launch, "choose_body", lambda *_: Body(16, 64, 4, 5))
    run(table.Case(90, 16))
    ((options, _, constants, _, _),) = attention.found
    assert options.num_stages == 5 and 5 in constants.values()


def test_the_device_is_asked_for_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: asked)
    ask = launch.shared_memory.__wrapped__
    assert ask(torch.device("cuda", 1)) == 101376 and ask(torch.device("cpu")) is None
