"""The kernel of FORK_ATTN_DEBUG=pages compiles, and its assertions are in it."""

from __future__ import annotations

import pytest
from test_bodies import table

from fork_attn.kernels.check_pages import BLOCK, check_pages_kernel


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_it_asserts(sm: int) -> None:
    types = {"plan": "*i64", "pages": "*i32", "num_listed": "i32", "num_pages": "i32"}
    values = {"PAGE_SIZE": 16, "BLOCK": BLOCK}
    signature = types | dict.fromkeys(values, "constexpr")
    compiled = table.compile_kernel(
        check_pages_kernel, signature, values, sm, aligned=["plan", "pages"], debug=True
    )
    assert compiled.ptx.count("__assertfail") >= 2
