"""What ops know of a batch. An argument, never a global.

Shapes: T tokens computed in this step, S sequences (rows), M most blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from millstream.core.cache import ALL_LEVELS


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Where one cache group's tokens lie.

    `slots` (T,) int64: block * block_size + offset where each new token's K/V goes.
    `block_tables` (S, M) int32: the blocks of each row in order, -1 where none is held.
    """

    slots: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """One ragged step: row s owns the tokens [query_start[s], query_start[s + 1]).

    `query_start` (S + 1,) int32; `positions` (T,) int64, those of the new tokens;
    `seq_lens` (S,) int32: tokens a row attends over, the new ones counted; `block_size` tokens a block.
    The new tokens of a row are always the last ones of its `seq_lens`. `num_positions`, where it is known, is more than
    any of `positions`.

    `prefix_levels`: of the tree that the rows' block tables make, how many levels may be read once for all rows that
    share them, where a backend can and where it pays. 0: each row reads its own; EVERY_LEVEL: whether it pays or not.
    The results are the same to the bit.
    """

    query_start: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    groups: Mapping[str, GroupLayout]
    block_size: int
    max_query: int
    max_seq: int
    num_positions: int | None = None
    prefix_levels: int = ALL_LEVELS

    @property
    def num_rows(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]
