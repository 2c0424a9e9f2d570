"""A plan's rows as the tensors that ops read.

Shapes: T tokens of the step, S rows, M most blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from millstream.core.cache import ALL_LEVELS
from millstream.core.plan import Extend
from millstream.ops.layout import BatchLayout, GroupLayout


class LayoutBuilder:
    """Builds layouts for cache `groups` (names, in the order of every row's holdings).

    Block tables of rows that did not change since the last step are not converted again.
    """

    def __init__(self, groups: Sequence[str], block_size: int) -> None:
        self.groups, self.block_size = tuple(groups), block_size
        self._tables: dict[tuple[int, int], tuple[tuple[int, ...], np.ndarray]] = {}

    def forget(self, seq: int) -> None:
        for place in range(len(self.groups)):
            self._tables.pop((seq, place), None)

    def build(self, extends: Sequence[Extend], prefix_levels: int = ALL_LEVELS) -> BatchLayout:
        counts = np.fromiter((len(extend.tokens) for extend in extends), np.int32, len(extends))
        starts = np.fromiter((extend.start for extend in extends), np.int64, len(extends))
        query_start = np.zeros(len(extends) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        # Token t of row s is at starts[s] + (t - query_start[s]).
        positions = np.arange(query_start[-1], dtype=np.int64) + np.repeat(starts - query_start[:-1], counts)
        seq_lens = (starts + counts).astype(np.int32)
        rows = np.repeat(np.arange(len(extends)), counts)
        groups = {}
        for place, name in enumerate(self.groups):
            tables = [self._table(extend, place) for extend in extends]
            width = max((len(table) for table in tables), default=0) or 1
            block_tables = np.full((len(extends), width), -1, np.int32)
            for row, table in enumerate(tables):
                block_tables[row, : len(table)] = table
            blocks = block_tables[rows, positions // self.block_size].astype(np.int64)
            slots = blocks * self.block_size + positions % self.block_size
            groups[name] = GroupLayout(torch.from_numpy(slots), torch.from_numpy(block_tables))
        return BatchLayout(
            torch.from_numpy(query_start),
            torch.from_numpy(positions),
            torch.from_numpy(seq_lens),
            groups,
            self.block_size,
            max_query=int(counts.max(initial=0)),
            max_seq=int(seq_lens.max(initial=0)),
            prefix_levels=prefix_levels,
        )

    def _table(self, extend: Extend, place: int) -> np.ndarray:
        blocks = extend.holdings[place].blocks
        known = self._tables.get((extend.seq, place))
        # A holding that did not change is the same tuple, so identity is enough and cheap.
        if known is None or known[0] is not blocks:
            known = (blocks, np.array(blocks, np.int32))
            self._tables[(extend.seq, place)] = known
        return known[1][: -(-extend.stop // self.block_size)]
