"""Plans of what `make gpu` measures, of the sizes that a card gets, without a card.

    python benchmarks/gpu/plans.py [--multiprocessors N] [--memory GIB]

Run by its dry run. Plans need no K and V: every plan of the sweep, of the calibration and of the
suite's shapes is made on the meta device, with the planner's costs of sm_90, and what its tensors
would take is counted. The exit status is 1 where they would not do, each named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import sweep
import torch

from fork_attn.bench.grow import pages_of, plan_of
from fork_attn.bench.shapes import HEADS, PAGE_SIZES, SHAPES
from fork_attn.calibrate import design
from fork_attn.calibrate.measure import capacity, effort

TARGET = "sm_90"
META = torch.device("meta")


@dataclass(frozen=True)
class Need:
    """What one plan reads, and the pages that its caches have."""

    name: str
    page_limit: int
    pages: int
    num_bytes: int

    def wrong(self, memory: int) -> str | None:
        """Why it cannot be measured on a card of so many bytes; None: it can."""
        if self.page_limit > self.pages:
            return f"{self.name}: the plan reads {self.page_limit} pages, there are {self.pages}"
        if self.num_bytes > memory:
            return f"{self.name}: {self.num_bytes / 2**30:.1f} GiB do not fit the card"
        return None


def of_sweep(workers: int) -> Iterator[Need]:
    """The plans of sweep.py."""
    for rows, load, page in sweep.todo(dry=False):
        plan = sweep.make_plan(TARGET, workers, rows, page, dry=False)
        _, k, v, _ = sweep.tensors_of(META, plan, page).arguments(plan, True)
        name = f"sweep, {rows} rows, {load}, pages of {page}"
        yield Need(name, plan.page_limit, k.shape[0], k.nbytes + v.nbytes)


def of_calibration(workers: int) -> Iterator[Need]:
    """The plans of `fork-attn calibrate`, quick and not."""
    for quick in (True, False):
        much = effort(torch.device("cuda"), quick)
        pages = capacity(much)
        tensors = design.Tensors(META, pages)
        for case in (
            *design.streamed_cases(TARGET, workers, much.stream_bytes),
            *design.resident_cases(TARGET, workers, much.call_ns),
            *design.tree_cases(TARGET, workers, pages),
        ):
            _, k, v, plan = tensors.arguments(case.plan, case.streamed)
            # Not nbytes: where nothing is streamed all pages are one.
            num_bytes = sum(x.untyped_storage().nbytes() for x in (k, v))
            name = f"calibrate{' --quick' if quick else ''}, {case.name}, {case.rows} rows"
            yield Need(name, plan.page_limit, k.shape[0], num_bytes)


def of_suite(workers: int) -> Iterator[Need]:
    """The suite's shapes with the first setting of heads and pages."""
    heads, page = HEADS[0], PAGE_SIZES[0]
    for name, shape in SHAPES.items():
        forest = shape.make()
        plan = plan_of(forest, heads, torch.bfloat16, page, TARGET, workers)
        pages = pages_of(forest, page)
        held = pages * page * heads.kv * heads.dim * 2 * torch.bfloat16.itemsize  # K and V
        # The inputs hold every token once more in bf16, made from fp32.
        yield Need(f"bench, {name}", plan.page_limit, pages, 3 * held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--memory", type=float, default=78.0, help="of the card, in GiB")
    args = parser.parse_args()
    wrong: list[str] = []
    for make in (of_sweep, of_calibration, of_suite):
        needs = list(make(args.multiprocessors))
        if not needs:
            wrong.append(f"{make.__name__}: nothing was planned")
            continue
        largest = max(needs, key=lambda need: need.num_bytes)
        found = [why for need in needs if (why := need.wrong(int(args.memory * 2**30)))]
        wrong += found
        size = f"{largest.num_bytes / 2**30:.1f} GiB ({largest.name})"
        print(f"{make.__name__}: {len(needs)} plans, {len(found)} cannot run; largest {size}")
    for why in wrong:
        print(f"CANNOT RUN: {why}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
