"""Many cases in one go: within a budget, going on where an earlier one stopped, and none that fails
costs the others."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fork_attn.bench.figures import STEP_LAYERS
from fork_attn.bench.machine import Limits, clocks, load_average, machine
from fork_attn.bench.measure import Case, run_case
from fork_attn.bench.results import line
from fork_attn.bench.way import FAILED, told
from fork_attn.costs import device_target, target_costs

SCHEMA = 1


@dataclass
class Session:
    """What is measured, and how.

    Attributes:
        device: "cpu" or "cuda".
        seconds: of timing each case.
        save: called with the result after each case: what an interrupted run has done is not lost.
        show: called with lines for people.
        only: names of ways; None means all.
        budget: seconds within which cases are begun; the last may end beyond. None: no limit.
        before: an earlier result. Its cases are kept where the same code measured them in the same
            way, with plans for the same costs, on the same machine; else all are measured anew.
    """

    device: torch.device
    seconds: float
    save: Callable[[dict[str, Any]], None]
    show: Callable[[str], None]
    only: Iterable[str] | None = None
    budget: float | None = None
    before: dict[str, Any] | None = None

    def run(self, todo: list[Case]) -> dict[str, Any]:
        """Measures all cases, or those that the budget allows: `not_reached` of the result names
        the others, `failed` those that gave no figures."""
        begun = time.monotonic()
        only = None if self.only is None else sorted(self.only)
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine(self.device),
            "device": self.device.type,
            "step_layers": STEP_LAYERS[self.device.type],
            "asked": {"seconds": self.seconds, "ways": only},
            "plan_costs": target_costs(device_target(self.device)),
            "load_before": load_average(),
            "clocks_before": clocks(),
        }
        rows, failed = self._kept(result)
        left = [case for case in todo if case.id not in rows]
        left.sort(key=lambda case: case.id in failed)  # what failed before may fail again
        result["cases_planned"] = len({case.id for case in todo} | set(rows))
        limits = Limits(self.device, min(self.seconds, 2.0))
        stream = ", ".join(f"{k} {v / 1e9:.1f} GB/s" for k, v in limits.stream.items())
        self.show(f"stream: {stream}")
        started = time.monotonic()
        for done, case in enumerate(left):
            if self.budget is not None and time.monotonic() - begun > self.budget:
                break
            failed.pop(case.id, None)
            try:
                rows[case.id] = run_case(case, limits, self.seconds, only)
                text = line(rows[case.id])
            except Exception as error:  # one case must not cost the others their figures
                failed[case.id] = told(error)
                text = f"{case.id:28} failed: {failed[case.id]}"
            each = (time.monotonic() - started) / (done + 1)
            self.show(
                f"[{done + 1:3}/{len(left)}, {each * (len(left) - done - 1):4.0f} s left] {text}"
            )
            usable = self._tidied()
            if not usable:
                failed[case.id] = _lost(rows.pop(case.id, None), failed.get(case.id))
                self.show(f"nothing more is measured: {failed[case.id]}")
            self._save(result, limits, todo, rows, failed)
            if not usable:
                break
        self._save(result, limits, todo, rows, failed)
        return result

    def _kept(self, result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The cases of the earlier result that need not be measured again, and those that failed;
        the rest of it is not of use."""
        before = self.before
        if before is None:
            return {}, {}

        def made(by: dict[str, Any]) -> Any:
            found = {k: v for k, v in by.get("machine", {}).items() if k != "date"}
            return by.get("schema"), found, by.get("asked"), by.get("plan_costs")

        commit = result["machine"]["commit"]
        if commit == "unknown" or commit.endswith("-dirty"):
            self.show(f"commit {commit}: what was measured before may be other code's; anew")
            return {}, {}
        if made(before) != made(result):
            self.show("what was measured before is another commit's, machine's or setting's: anew")
            return {}, {}
        rows = {row["id"]: row for row in before["cases"]}
        self.show(f"{len(rows)} cases were measured before, {before['machine']['date']}: kept")
        kept = before.get("kept", [])
        older = {name for one in kept for name in one["cases"]}
        newer = [name for name in rows if name not in older]
        result["kept"] = [*kept, {"date": before["machine"]["date"], "cases": newer}]
        return rows, {row["id"]: row["reason"] for row in before.get("failed", ())}

    def _save(
        self,
        result: dict[str, Any],
        limits: Limits,
        todo: list[Case],
        rows: dict[str, Any],
        failed: dict[str, str],
    ) -> None:
        tried = set(rows) | set(failed)
        result |= {
            "limits": limits.as_json(),
            "cases": list(rows.values()),
            "failed": [{"id": name, "reason": reason} for name, reason in failed.items()],
            "not_reached": [case.id for case in todo if case.id not in tried],
            "load_after": load_average(),
            "clocks_after": clocks(),
        }
        self.save(result)

    def _tidied(self) -> bool:
        """Whether the device still works; after an illegal access nothing does."""
        gc.collect()
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True


def _lost(row: dict[str, Any] | None, reason: str | None) -> str:
    """Why a case has no figures after which the device is of no use: all that ran behind the first
    that failed failed too, and nothing of it counts."""
    failures = [f"{name}: {why}" for name, why in (row or {"absent": {}})["absent"].items()]
    first = [text for text in failures if FAILED in text]
    return f"the device was lost; {reason or '; '.join(first) or 'no call said so'}"
