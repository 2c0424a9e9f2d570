"""Rows that hold the same blocks read them together: to the last bit what each reads alone, in any tree of any rows."""

from __future__ import annotations

import ctypes
import dataclasses
import platform

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_steps import Step, ask_of, lay_out
from millstream.core import registry
from millstream.core.cache import ALL_LEVELS, EVERY_LEVEL
from millstream.ops.attention._native import Branch, branches
from millstream.ops.attention.protocol import AttentionBackend
from millstream.ops.cases.attention import GEMMA, AttentionCase
from millstream.ops.cpu import build
from millstream.ops.layout import BatchLayout

# By kind of page: the kv format, its dtype, the backend.
PAGES = {
    "float32": ("plain", "float32", "cpu-paged"),
    "bfloat16": ("plain", "bfloat16", "cpu-paged"),
    "bytes": ("int8", "float32", "cpu-int8"),
    "nibbles": ("int4", "float32", "cpu-int4"),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A row: it holds the first `shared` tokens of row `parent`, then `own` ones, the last `new` of them new."""

    parent: int
    shared: int
    own: int
    new: int


def grow(leaves: list[Leaf], kind: str, **options: object) -> Step:
    """Pages in which each row begins with blocks of its parent, as forks and the prefix index leave them."""
    kv, dtype, _ = PAGES[kind]
    size = options.get("block_size", 64)
    rows: list[tuple[int, int]] = []
    shared: list[int] = []
    for place, leaf in enumerate(leaves):
        # What a parent holds for others is what it had before this step.
        held = rows[leaf.parent % place][1] - rows[leaf.parent % place][0] if place else 0
        shared.append(min(leaf.shared, held) // size * size)
        rows.append((min(leaf.new, leaf.own), shared[-1] + leaf.own))
    case = AttentionCase("tree", tuple(rows), page_dtype=dtype, **options)
    step = lay_out(case, kv)
    for place, leaf in enumerate(leaves):
        if place:
            step.tables[place][: shared[place] // size] = step.tables[leaf.parent % place][: shared[place] // size]
    return step


def whole(step: Step) -> BatchLayout:
    return step.layout([(row, n, length) for row, (n, length) in enumerate(step.case.rows)])


def backend(kind: str, step: Step) -> AttentionBackend:
    name = PAGES[kind][2]
    found: AttentionBackend = registry.make("attention", name)
    ask = ask_of(step.case)
    if kind in ("bytes", "nibbles"):
        ask = dataclasses.replace(ask, page_dtype="uint8", page_layout=step.pages.layout)
    refusal = found.accepts(ask)
    if refusal is not None:
        pytest.skip(refusal.reason)
    return found


def planned(step: Step, layout: BatchLayout) -> list[Branch]:
    case = step.case
    return branches(layout, "full", step.pages.num_blocks, case.heads, case.kv_heads, case.dim, case.window)


def agree(step: Step, kind: str, q: torch.Tensor | None = None, layout: BatchLayout | None = None) -> None:
    """Together, with the first level together, and each row by itself: the same bits."""
    layout, q = layout or whole(step), step.q if q is None else q
    attention = backend(kind, step)
    want = step.run(attention, dataclasses.replace(layout, prefix_levels=0), q)
    for levels in (1, ALL_LEVELS, EVERY_LEVEL):
        got = step.run(attention, dataclasses.replace(layout, prefix_levels=levels), q)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


FEW_SHOT = [
    Leaf(0, 0, 1300, 1), *(Leaf(0, 700, 40 + 7 * i, 1) for i in range(4)),
    *(Leaf(1, 1300, 30 + i, 1) for i in range(3)),
    Leaf(0, 1200, 90, 5), Leaf(0, 640, 200, 60), Leaf(0, 0, 900, 1),
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", PAGES)
def test_a_tree_of_decodes_and_chunks_gives_the_bits_of_each_row_alone(kind, count, threads):
    threads(count)
    step = grow(FEW_SHOT, kind)
    assert planned(step, dataclasses.replace(whole(step), prefix_levels=EVERY_LEVEL))
    agree(step, kind)


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16}, {"block_size": 48}, {"block_size": 256}, {"window": 600},
        {"window": 1100}, {"softcap": 5.0},
        GEMMA, {**GEMMA, "window": 700}, {"heads": 5, "kv_heads": 5}, {"heads": 4, "kv_heads": 1},
        {"heads": 6, "kv_heads": 2, "dim": 72}, {"sharp": 6.0},
    ],
    ids=str,
)  # fmt: skip
def test_any_shape_of_heads_blocks_and_masks_gives_the_same_bits(kind, options):
    step = grow(FEW_SHOT, kind, **options)
    assert planned(step, dataclasses.replace(whole(step), prefix_levels=EVERY_LEVEL))
    agree(step, kind)


leaves = st.lists(
    st.builds(
        Leaf,
        parent=st.integers(0, 7),
        shared=st.integers(0, 1700),
        own=st.one_of(st.integers(1, 40), st.integers(1, 700)),
        new=st.one_of(st.just(1), st.integers(1, 12), st.integers(1, 80)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    tree=leaves,
    kind=st.sampled_from(sorted(PAGES)),
    block_size=st.sampled_from([16, 48, 64]),
    window=st.sampled_from([None, None, 90, 640]),
    count=st.integers(1, 3),
)
def test_random_trees_give_the_bits_of_each_row_alone(tree, kind, block_size, window, count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        step = grow(tree, kind, block_size=block_size, window=window)
        agree(step, kind)
        for levels in (ALL_LEVELS, EVERY_LEVEL):
            sound(step, dataclasses.replace(whole(step), prefix_levels=levels))
    finally:
        torch.set_num_threads(before)


def sound(step: Step, layout: BatchLayout) -> None:
    """What is read together may be: all of its rows hold it in the same blocks, and all queries see it."""
    case, size = step.case, step.case.block_size
    tables = layout.groups["full"].block_tables
    taken: set[tuple[int, int]] = set()
    for branch in planned(step, layout):
        assert branch.start % 64 == 0 and branch.stop % 64 == 0 and branch.start < branch.stop
        assert branch.start // 512 == (branch.stop - 1) // 512
        assert len(branch.rows) > 1 and len(set(branch.rows)) == len(branch.rows)
        held = tables[list(branch.rows), branch.start // size : (branch.stop - 1) // size + 1]
        assert (held == held[0]).all() and (held >= 0).all()
        for row in branch.rows:
            n, length = case.rows[row]
            assert branch.stop <= length - n + 1
            assert case.window is None or branch.start >= max(0, length - case.window)
            keys = {(row, key) for key in range(branch.start, branch.stop, 64)}
            assert not keys & taken
            taken |= keys


def test_rows_that_join_and_leave_between_steps_change_no_bit_of_the_others():
    step = grow(FEW_SHOT, "float32")
    attention = backend("float32", step)
    rows = [(row, n, length) for row, (n, length) in enumerate(step.case.rows)]
    starts = [sum(n for _, n, _ in rows[:row]) for row in range(len(rows))]
    alone = []
    for row, (_, n, _) in enumerate(rows):
        alone.append(step.run(attention, step.layout([rows[row]]), step.q[starts[row] : starts[row] + n]))
    for company in ([0, 1, 2], [1, 2], [2, 1, 5, 8], [8, 0, 3], [9, 4, 3, 2, 1, 0], [5, 6, 7], [10, 0]):
        q = torch.cat([step.q[starts[row] : starts[row] + rows[row][1]] for row in company])
        out, lse = step.run(attention, step.layout([rows[row] for row in company]), q)
        assert torch.equal(out, torch.cat([alone[row][0] for row in company]))
        assert torch.equal(lse, torch.cat([alone[row][1] for row in company]))


# -- what is planned


def test_levels_are_those_of_the_tree_and_ragged_suffixes_stay_apart(threads):
    threads(2)
    #       0..1024 all of 0, 1, 2, 3; 2 and 3 share 256 more; 4 is a stranger
    tree = [Leaf(0, 0, 1100, 1), Leaf(0, 1024, 3, 1), Leaf(0, 1024, 300, 1), Leaf(2, 1280, 77, 1), Leaf(0, 0, 500, 1)]
    step = grow(tree, "float32")
    layout = whole(step)
    assert planned(step, layout) == [
        Branch(0, 512, (0, 1, 2, 3), 1), Branch(512, 1024, (0, 1, 2, 3), 1), Branch(1024, 1280, (2, 3), 2),
    ]  # fmt: skip
    assert planned(step, dataclasses.replace(layout, prefix_levels=1)) == [
        Branch(0, 512, (0, 1, 2, 3), 1), Branch(512, 1024, (0, 1, 2, 3), 1),
    ]  # fmt: skip
    assert planned(step, dataclasses.replace(layout, prefix_levels=0)) == []


def test_a_branch_may_begin_and_end_inside_a_segment(threads):
    threads(2)
    tree = [Leaf(0, 0, 460, 1), Leaf(0, 192, 300, 1), Leaf(1, 448, 60, 1), Leaf(0, 200, 50, 1)]
    step = grow(tree, "float32")
    assert planned(step, whole(step)) == [Branch(0, 192, (0, 1, 2, 3), 1), Branch(192, 448, (1, 2), 2)]


def test_what_is_not_worth_it_is_read_row_by_row(threads):
    threads(2)
    alone = grow([Leaf(0, 0, 2000, 1)], "float32")
    assert planned(alone, whole(alone)) == []
    strangers = grow([Leaf(0, 0, 600, 1)] * 6, "float32")
    assert planned(strangers, whole(strangers)) == []
    short = grow([Leaf(0, 0, 65, 1), Leaf(0, 64, 5, 1)], "float32")
    assert planned(short, whole(short)) == []
    # Each of these reads a key for as many queries at a time as they would together.
    chunks = grow([Leaf(0, 0, 1100, 64), *(Leaf(0, 1024, 64, 64),) * 3], "float32")
    assert planned(chunks, whole(chunks)) == []
    assert planned(short, dataclasses.replace(whole(short), prefix_levels=EVERY_LEVEL)) == [Branch(0, 64, (0, 1), 1)]


def test_what_the_window_of_any_query_hides_is_not_shared(threads):
    threads(2)
    tree = [Leaf(0, 0, 1200, 1), Leaf(0, 1152, 100, 1), Leaf(0, 1152, 150, 1)]
    step = grow(tree, "float32", window=760)
    # Keys from 440, 492 and 542 on are seen: the third row begins inside the segment that the others share.
    assert planned(step, whole(step)) == [Branch(512, 1024, (0, 1), 1), Branch(1024, 1152, (0, 1, 2), 2)]
    agree(step, "float32")


@pytest.mark.long
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_trees_give_the_same_bits_on_older_machines(machine, tmp_path, monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("not an x86 machine")
    monkeypatch.setattr(build, "MACHINE_FLAGS", ((f"-march={machine}",),))
    for name in ("program", "paged_attention"):
        library = ctypes.CDLL(str(build.build(build.SOURCES / f"{name}.cpp", tmp_path)))
        monkeypatch.setitem(build._libraries, (build.settings(), name), library)
    for kind in PAGES:
        for options in ({}, {"window": 700}):
            agree(grow(FEW_SHOT, kind, **options), kind)
