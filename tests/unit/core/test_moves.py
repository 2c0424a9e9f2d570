"""Moves of blocks together: the same in the end as one after the other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millstream.core.plan import Move, Tier, in_bulk

BLOCKS = 4
MOVES = st.lists(
    st.builds(
        Move,
        st.sampled_from(["full", "window"]),
        st.integers(0, BLOCKS - 1),
        st.integers(0, BLOCKS - 1),
        st.sampled_from(Tier),
        st.sampled_from(Tier),
    ),
    max_size=30,
)


def fresh() -> dict[tuple[str, Tier, int], object]:
    return {(group, tier, block): (tier, block) for group in ("full", "window") for tier in Tier for block in range(4)}


@given(MOVES)
def test_together_is_as_one_after_the_other(moves) -> None:
    single, bulk = fresh(), fresh()
    for move in moves:
        single[move.group, move.target_tier, move.target] = single[move.group, move.source_tier, move.source]
    found = in_bulk(moves)
    for one in found:
        # All are read before any is written.
        read = [bulk[one.group, one.source_tier, source] for source in one.sources]
        assert len(set(one.targets)) == len(one.targets)
        for target, what in zip(one.targets, read, strict=True):
            bulk[one.group, one.target_tier, target] = what
    assert bulk == single
    assert sum(len(one.sources) for one in found) == len(moves)


def test_a_request_that_leaves_for_another_is_two_moves() -> None:
    leaves = [Move("full", block, 10 + block, Tier.DEVICE, Tier.HOST) for block in range(3)]
    comes = [Move("full", 20 + block, block, Tier.HOST, Tier.DEVICE) for block in range(3)]
    out, back = in_bulk([*leaves, *comes])
    assert (out.sources, out.targets, out.target_tier) == ([0, 1, 2], [10, 11, 12], Tier.HOST)
    assert (back.sources, back.targets, back.target_tier) == ([20, 21, 22], [0, 1, 2], Tier.DEVICE)
    # Copies of which one needs the other cannot go together.
    assert len(in_bulk([Move("full", 1, 2), Move("full", 2, 3)])) == 2
    assert len(in_bulk([Move("full", 1, 2), Move("window", 2, 3), Move("full", 1, 3)])) == 2
