"""Counter-based random numbers: known answers, one value in every form, and evenness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millstream.ops.cases.random import KNOWN
from millstream.ops.ref.random import bits, uniform, uniform_rows

WORD = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(("words", "expected"), KNOWN)
def test_known_answers(words, expected):
    assert bits(*words) == expected
    assert uniform(*words) == (expected >> 11) / 2**53


@given(seed=WORD, index=WORD, position=WORD, draw=WORD)
def test_the_torch_form_gives_the_same_number(seed, index, position, draw):
    rows = [torch.tensor([word, 0]) for word in (seed, index, position, draw)]
    assert uniform_rows(*rows)[0].item() == uniform(seed, index, position, draw)


def test_numbers_are_even_and_neighbours_unrelated():
    position = torch.arange(200_000)
    zero = torch.zeros_like(position)
    drawn = {
        "position": uniform_rows(zero, zero, position),
        "seed": uniform_rows(position, zero, zero),
        "index": uniform_rows(zero, position, zero),
        "draw": uniform_rows(zero, zero, zero, position),
    }
    for numbers in drawn.values():
        assert numbers.min() >= 0 and numbers.max() < 1
        shares = torch.histc(numbers.float(), 64, 0, 1) / len(position)
        # Five standard deviations of a bin's share.
        assert (shares - 1 / 64).abs().max() < 5 * (1 / 64 / len(position)) ** 0.5
        assert abs(torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]) < 0.012
    assert abs(torch.corrcoef(torch.stack(tuple(drawn.values()))).fill_diagonal_(0)).max() < 0.012
