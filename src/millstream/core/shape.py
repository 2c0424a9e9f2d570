"""What the time of a step depends on, without what the step says."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from millstream.core.plan import NO_BLOCK, Extend, StepPlan


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts of one step. A row that computes one token decodes; one that computes more prefills.

    `prefill_pairs` are pairs of a query and a key that it sees, `decode_keys` the keys that decoding rows read, and
    `shared_keys` those of them that another decoding row reads too: so many fewer are read where rows that hold the
    same blocks read them once. `sampled` rows need the model's head.
    """

    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_rows: int = 0
    decode_keys: int = 0
    shared_keys: int = 0
    sampled: int = 0

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_rows


def shape_of(plan: StepPlan, block_size: int) -> StepShape:
    """The shape of a plan whose blocks hold so many tokens."""
    rows = tokens = pairs = keys = sampled = 0
    decoding = []
    for extend in plan.extends:
        count = len(extend.tokens)
        if count == 1:
            decoding.append(extend)
            keys += extend.start + 1
        else:
            rows += 1
            tokens += count
            pairs += count * extend.start + count * (count + 1) // 2
        if extend.sample is not None:
            sampled += 1
        elif extend.score is not None:
            sampled += count
    return StepShape(rows, tokens, pairs, len(decoding), keys, _shared_keys(decoding, block_size), sampled)


def _shared_keys(decoding: Sequence[Extend], block_size: int) -> int:
    """How many keys the trie of the rows' block tables saves: its rows' lengths less the length of the trie."""
    tables = []
    for extend in decoding:
        # Groups with a window forget where rows began; the first that does not stands for all layers.
        table = next((one.blocks for one in extend.holdings if one.blocks and one.blocks[0] != NO_BLOCK), None)
        if table is not None:
            tables.append((table, extend.start + 1))
    if len({table[0] for table, _ in tables}) == len(tables):
        return 0
    tables.sort()
    shared = 0
    for (table, keys), (other, others) in pairwise(tables):
        # A block has one place in the tree of prefixes: tables that have it in common have all before it in common.
        most = min(len(table), len(other))
        same = bisect_left(range(most), True, key=lambda place: table[place] != other[place])
        if same:
            shared += min(same * block_size, keys, others)
    return shared
