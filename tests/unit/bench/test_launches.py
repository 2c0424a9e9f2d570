"""What counts as a launch: ops that compute or copy, and calls of native code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from millstream.bench.launches import launches
from millstream.ops.cpu import build
from millstream.ops.cpu.linear import linear_cpu


def test_views_and_fresh_memory_are_no_launches():
    x = torch.ones(4, 6)

    def run() -> None:
        y = torch.empty(6, 4)
        x.view(6, 4).T.reshape(2, 2, 6)[0].add(1).mul_(2)
        x.T.reshape(24)
        torch.cat((y, x.T))

    with torch.inference_mode():
        found = launches(run)
    # Only the second reshape copies; add, mul_, cat.
    assert (found.ops, found.native, found.total) == (4, 0, 4)


def test_compound_ops_are_what_they_are_made_of():
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    with torch.inference_mode():
        assert launches(lambda: F.linear(x, weight)).ops == 1
        assert launches(lambda: x.square().mean(-1, keepdim=True)).ops == 2


def test_native_calls_are_counted_and_the_library_is_given_back():
    x, weight = torch.ones(3, 8), torch.ones(5, 8)
    try:
        linear_cpu(x, weight)
    except build.KernelError as error:
        pytest.skip(str(error))
    library = build.library
    found = launches(lambda: linear_cpu(x, weight))
    assert (found.ops, found.native) == (0, 1)
    with pytest.raises(RuntimeError, match="stop"):
        launches(lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert build.library is library
