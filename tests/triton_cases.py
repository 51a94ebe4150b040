"""Tree attention by Triton on a plan, against the oracle; on a GPU or under the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from plan_cases import NAN, Case, Shape, make_case

from fork_attn.kernels.launch import Workspace, tree_attention
from fork_attn.plan_format import expand_plan, header, sections
from fork_attn.reference import attention
from fork_attn.testing.tolerance import assert_close_to_oracle

FP8 = torch.float8_e4m3fn


@dataclass
class TritonCase(Case):
    """A case on a device, with what only this kernel takes."""

    device: str = "cpu"
    programs: int = 1
    use_tma: bool | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    rows: int | None = None  # of the output, at least the plan's
    padding: int = 0  # words behind the plan
    merge: str = "inside"
    workspace: Workspace | None = None

    def to(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else move(x, self.device)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        s, h = self.shape, header(self.plan)
        rows = self.rows or h.num_tokens
        heads = self.q.shape[1]
        out = torch.full((rows, heads, s.head_dim_v), NAN, dtype=s.dtype, device=self.device)
        lse = torch.full((rows, heads), NAN, device=self.device)
        junk = torch.full((self.padding,), -1)
        if self.workspace is None:
            self.workspace = Workspace.allocate(
                h.num_partial_rows, rows, heads, s.num_kv_heads, s.head_dim_v, out.device
            )
            self.workspace.partial_out.fill_(NAN)
            self.workspace.partial_lse.fill_(NAN)
        tree_attention(
            *map(self.to, (self.q, self.k, self.v, torch.cat([self.plan, junk]))),
            self.to(sections(self.plan).pages.clone()),
            out,
            lse,
            self.workspace,
            num_programs=self.programs,
            max_block_tokens=h.max_block_tokens,
            page_size=s.page_size,
            group=s.group,
            window=h.window,
            softmax_scale=self.scale,
            softcap=self.softcap or 0.0,
            sinks=self.to(self.sinks),
            k_scale=self.to(self.k_scale),
            v_scale=self.to(self.v_scale),
            use_tma=self.use_tma,
            merge=self.merge,  # type: ignore[arg-type]
        )
        assert not self.workspace.counters.any(), "counters are left at zero"
        return out.cpu(), lse.cpu()

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        mask = expand_plan(self.plan)
        k, v = (cache.flatten(0, 1)[: mask.shape[1]].to(dtype) for cache in (self.k, self.v))
        if self.k_scale is not None:
            k = k * self.k_scale[:, None].to(dtype)
        if self.v_scale is not None:
            v = v * self.v_scale[:, None].to(dtype)
        options = {"softmax_scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return attention(self.q[: len(mask)], k, v, mask, dtype=dtype, **options)

    def check(self) -> None:
        out, lse = self.run()
        oracle, oracle_lse = self.dense(torch.float64)
        reference, _ = self.dense(self.shape.dtype)
        _, reference_lse = self.dense(torch.float32)
        count = len(oracle)
        assert_close_to_oracle(out[:count], oracle, reference)
        assert_close_to_oracle(lse[:count], oracle_lse, reference_lse, name="lse")
        if self.sinks is None:
            assert lse[count:].eq(-torch.inf).all()
        else:
            assert torch.equal(lse[count:], self.sinks.expand(len(out) - count, -1))
        assert out[count:].eq(0).all()


def move(x: torch.Tensor, device: str) -> torch.Tensor:
    """To a device with strides kept."""
    if x.device.type == device:
        return x
    storage = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return storage.copy_(x)


def triton_case(
    shape: Shape, plan: torch.Tensor, *, kv_dtype: torch.dtype | None = None,
    heads_inside: bool = True, **options: object,
) -> TritonCase:  # fmt: skip
    """Random data for a plan (see `make_case`); K and V in `kv_dtype`, with scales if that is
    fp8."""
    case = make_case(shape, plan, heads_inside=heads_inside)
    k, v = case.k, case.v
    if kv_dtype == FP8:
        options["k_scale"] = torch.rand(shape.num_kv_heads) + 0.5
        options["v_scale"] = torch.rand(shape.num_kv_heads) + 0.5
        k, v = k.to(FP8), v.to(FP8)
    return TritonCase(shape, plan, case.q, k, v, case.scale, **options)  # type: ignore[arg-type]
