"""Which ops a format of weights goes by is a matter of the model that it was made for, not of the process."""

from __future__ import annotations

import pytest
import torch

from millstream.models.blocks import linear
from millstream.models.blocks.linear import weight_format
from millstream.ops import table
from millstream.ops.ref.blocks import linear_blocks


@pytest.mark.parametrize("first", ["ref", "auto"])
def test_models_that_choose_their_ops_differently_share_no_format(first):
    linear._format.cache_clear()  # whoever comes first is to be the first of the process
    chosen = {}
    for use in (first, {"ref": "auto", "auto": "ref"}[first]):
        with table.use(use):
            held = weight_format("block4")
            assert weight_format("block4") is held, "one serves all matrices"
            chosen[use] = held._linear
    assert chosen["ref"] is linear_blocks.reference
    assert chosen["auto"] is linear_blocks.resolve(table.Ask("cpu", torch.float32))
