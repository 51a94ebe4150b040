"""Tries an installed wheel's extension by itself: what .ci/wheels does where torch has no build."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata


def main() -> None:
    (path,) = (
        entry.locate()
        for entry in metadata.files("fork-attn") or ()
        if entry.name.startswith("_C.") and entry.suffix == ".so"
    )
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)

    cache = core.CacheCore(64, 16, False)
    root = cache.new_branch()
    children = cache.fork(root, 3)
    cache.check()
    cache.free(children)
    assert cache.alive(root) and not any(map(cache.alive, children))
    cuda = core.cuda_info()
    code = cuda["architectures"] or "none"
    print(sys.version.split()[0], core.build_info(), "device code:", code)


if __name__ == "__main__":
    main()
