"""Compiles FlashInfer's Hopper modules on a machine without a GPU, for bf16 and head_dim 128.

Run by collect.sh, which installs FlashInfer and sets CUDA_HOME, LD_LIBRARY_PATH and
CPLUS_INCLUDE_PATH. The results are WORK/.cache/flashinfer/VERSION/90a/cached_ops/NAME/NAME.so; on
the GPU machine they belong in flashinfer/data/aot/NAME/NAME.so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

MODULES = ("decode", "fa2", "fa3", "cascade", "page", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for objects and results")
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(MODULES)}")
    args = parser.parse_args()
    chosen = args.modules or MODULES
    if unknown := sorted(set(chosen) - set(MODULES)):
        parser.error(f"module: expected of {', '.join(MODULES)}, got {', '.join(unknown)}")

    stub = _stub_driver(args.work / "stub")
    # FlashInfer reads these when it is imported.
    os.environ.update(
        FLASHINFER_CUDA_ARCH_LIST="9.0a",
        FLASHINFER_WORKSPACE_BASE=str(args.work),
        FLASHINFER_EXTRA_LDFLAGS=f"-L{stub} -Wl,--allow-shlib-undefined",
        MAX_JOBS=os.environ.get("MAX_JOBS", "2"),
    )
    builders = _builders()
    for name in chosen:
        start = time.monotonic()
        builders[name]()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def _stub_driver(folder: Path) -> Path:
    """The modules link -lcuda; the toolkit has no stub of it, and an empty library is enough."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "empty.c"
    source.write_text("void fork_attn_stub(void) {}\n")
    options = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so"))
    subprocess.run(["gcc", *options, str(source)], check=True)
    return folder


def _builders() -> dict[str, Callable[[], object]]:
    import flashinfer
    import torch
    from flashinfer.decode import get_batch_decode_module
    from flashinfer.prefill import get_batch_prefill_module

    kv = torch.bfloat16
    # q, kv and out dtype, index dtype, head_dim of K and V, no RoPE, no window, no softcap
    common = (kv, kv, kv, torch.int32, 128, 128, 0, False, False)
    return {
        "decode": lambda: get_batch_decode_module(*common),
        "fa2": lambda: get_batch_prefill_module("fa2", *common, False),
        "fa3": lambda: get_batch_prefill_module("fa3", *common, False),
        "cascade": lambda: flashinfer.cascade.get_cascade_module(),
        "page": lambda: flashinfer.page.get_page_module(),
        # no window among its options, but a profiler
        "attention": lambda: flashinfer.attention.get_holistic_attention_module(*common),
    }


if __name__ == "__main__":
    main()
