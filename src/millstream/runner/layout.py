"""A plan's rows as the tensors that ops read.

Shapes: T tokens of the step, S rows, M most blocks of a row.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch

from millstream.core.cache import ALL_LEVELS
from millstream.core.plan import Extend
from millstream.ops.layout import BatchLayout, GroupLayout


class LayoutBuilder:
    """Builds layouts for cache `groups` (names, in the order of every row's holdings).

    Block tables of rows that did not change since the last step are not converted again, and where no row's did, the
    tensor of them is the last step's. A step of single tokens is put together from lists: its arrays are so short that
    what counts is how many calls make them.
    """

    def __init__(self, groups: Sequence[str], block_size: int) -> None:
        self.groups, self.block_size = tuple(groups), block_size
        self._tables: dict[tuple[int, int], tuple[tuple[int, ...], np.ndarray]] = {}
        self._whole: dict[str, tuple[list[tuple[int, ...]], list[int], torch.Tensor]] = {}
        self._starts = torch.empty(0, dtype=torch.int32)

    def forget(self, seq: int) -> None:
        for place in range(len(self.groups)):
            self._tables.pop((seq, place), None)

    def build(self, extends: Sequence[Extend], prefix_levels: int = ALL_LEVELS) -> BatchLayout:
        if all(len(extend.tokens) == 1 for extend in extends):
            return self._single(extends, prefix_levels)
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
            block_tables = self._block_tables(extends, place)
            blocks = block_tables.numpy()[rows, positions // self.block_size].astype(np.int64)
            slots = blocks * self.block_size + positions % self.block_size
            groups[name] = GroupLayout(torch.from_numpy(slots), block_tables)
        return BatchLayout(
            torch.from_numpy(query_start),
            torch.from_numpy(positions),
            torch.from_numpy(seq_lens),
            groups,
            self.block_size,
            max_query=int(counts.max(initial=0)),
            max_seq=int(seq_lens.max(initial=0)),
            num_positions=int(seq_lens.max(initial=0)),
            prefix_levels=prefix_levels,
        )

    def _single(self, extends: Sequence[Extend], prefix_levels: int) -> BatchLayout:
        """A step in which every row computes one token."""
        count, size = len(extends), self.block_size
        positions = [extend.start for extend in extends]
        if self._starts.shape[0] <= count:
            self._starts = torch.arange(2 * count + 1, dtype=torch.int32)
        groups = {}
        for place, name in enumerate(self.groups):
            slots = [
                extend.holdings[place].blocks[position // size] * size + position % size
                for extend, position in zip(extends, positions, strict=True)
            ]
            groups[name] = GroupLayout(torch.from_numpy(np.array(slots, np.int64)), self._block_tables(extends, place))
        most = max(positions, default=-1) + 1
        return BatchLayout(
            self._starts[: count + 1],
            torch.from_numpy(np.array(positions, np.int64)),
            torch.from_numpy(np.array([position + 1 for position in positions], np.int32)),
            groups,
            size,
            max_query=min(count, 1),
            max_seq=most,
            num_positions=most,
            prefix_levels=prefix_levels,
        )

    def _block_tables(self, extends: Sequence[Extend], place: int) -> torch.Tensor:
        name = self.groups[place]
        blocks = [extend.holdings[place].blocks for extend in extends]
        counts = [-(-extend.stop // self.block_size) for extend in extends]
        known = self._whole.get(name)
        # A holding that did not change is the same tuple, so identity is enough and cheap.
        if known is not None and known[1] == counts and all(map(operator.is_, known[0], blocks)):
            return known[2]
        tables = [self._table(extend, place)[:needed] for extend, needed in zip(extends, counts, strict=True)]
        block_tables = np.full((len(extends), max(counts, default=0) or 1), -1, np.int32)
        for row, table in enumerate(tables):
            block_tables[row, : len(table)] = table
        self._whole[name] = (blocks, counts, torch.from_numpy(block_tables))
        return self._whole[name][2]

    def _table(self, extend: Extend, place: int) -> np.ndarray:
        blocks = extend.holdings[place].blocks
        known = self._tables.get((extend.seq, place))
        if known is None or known[0] is not blocks:
            known = (blocks, np.array(blocks, np.int32))
            self._tables[(extend.seq, place)] = known
        return known[1]
