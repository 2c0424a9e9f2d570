"""Dense weights: the yardstick of the other formats."""

from __future__ import annotations

import pytest
import torch

from millstream.core import registry
from millstream.core.errors import ConfigError, UnknownName

DENSE = registry.make("weights", "dense", device=True)
WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
BIAS = torch.arange(6.0)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_packing_and_unpacking_changes_nothing_and_copies_nothing():
    packed = DENSE.pack(WEIGHT, BIAS)
    assert packed.shape == (6, 4) and packed.nbytes == (24 + 6) * 4
    assert DENSE.unpack(packed).data_ptr() == WEIGHT.data_ptr()


def test_linear_is_the_product_with_what_unpack_gives():
    packed = DENSE.pack(WEIGHT, BIAS)
    torch.testing.assert_close(DENSE.linear(X, packed), X @ DENSE.unpack(packed).T + BIAS)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_shards_by_column_are_pieces_of_the_result_and_by_row_terms_of_it(num_ranks):
    packed = DENSE.pack(WEIGHT, BIAS)
    whole = DENSE.linear(X, packed)
    columns = [DENSE.linear(X, DENSE.shard(packed, "column", r, num_ranks)) for r in range(num_ranks)]
    torch.testing.assert_close(torch.cat(columns, -1), whole)
    inputs = X.chunk(num_ranks, -1)
    rows = [DENSE.linear(inputs[r], DENSE.shard(packed, "row", r, num_ranks)) for r in range(num_ranks)]
    torch.testing.assert_close(sum(rows), whole)


def test_a_shard_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="rank 0 of 4"):
        DENSE.shard(DENSE.pack(WEIGHT), "column", 0, 4)
    with pytest.raises(ConfigError, match="diagonal"):
        DENSE.shard(DENSE.pack(WEIGHT), "diagonal", 0, 2)


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(UnknownName, match="scales"):
        DENSE.pack(WEIGHT)["scales"]
