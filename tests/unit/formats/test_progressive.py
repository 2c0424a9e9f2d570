"""Two levels of 4-bit codes: the protective range, and what choosing ranges and roundings by the inputs buys."""

from __future__ import annotations

import itertools

import pytest
import torch

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.core.registry import Choice
from millstream.formats.weights._progressive import (
    PROTECTIVE,
    clipped,
    first_level,
    grid_of,
    one_level,
    rounded_in_turn,
    second_level,
)
from millstream.ops.ref.channel import unpack_stream

# In 8 bits: its largest becomes 128 with a step of 16, which a range of 127 allows.
ADVERSARIAL = [127.0, -113.0]


def whole(weight: torch.Tensor, bound: int) -> torch.Tensor:
    """What is multiplied, (code - z) * step, as whole numbers."""
    grid = grid_of(weight, 1, bound=bound)
    unscaled = grid.values(grid.codes(weight[:, None])) / grid.scale[..., None]
    return torch.round(unscaled).flatten(1)


def test_the_protective_range_holds_for_every_pair_of_extremes():
    pairs = list(itertools.product(range(PROTECTIVE + 1), range(PROTECTIVE + 1)))
    high, low = (torch.tensor(side, dtype=torch.float32) for side in zip(*pairs, strict=True))
    # Every value that a weight can have between them, halves included: those are rounded furthest.
    steps = torch.ceil((high + low) / 15).clamp(min=1)
    assert int(steps.max()) == 16
    z = torch.round(low / steps).clamp(0, 15)
    for value in (high, -low, high - 0.5, 0.5 - low):
        value = value.clamp(min=-low, max=high)
        code = (torch.round(value / steps) + z).clamp(0, 15)
        assert int(((code - z) * steps).abs().max()) <= 127


def test_an_adversarial_row_overflows_with_a_range_of_127_and_not_with_119():
    row = torch.tensor([ADVERSARIAL * 16])
    assert int(whole(row, 127).abs().max()) > 127
    assert int(whole(row, PROTECTIVE).abs().max()) <= 127
    # Multiplied as bytes, what overflows comes back with the other sign; what is kept within the range is right.
    form = registry.make("weights", Choice("w4a8", {"group": 32}))
    packed = form.pack(row)
    assert (form.unpack(packed) - row).abs().max() < 9
    held = unpack_stream(packed["stream"], 1, 32, 4)
    assert int(((held["codes"] - held["z"]) * held["step"]).abs().max()) <= 127


def test_making_errors_good_does_not_leave_a_byte():
    # A step of 9 and a zero of 0: the last code would be 135. The errors of the first input push the second there.
    weight = torch.tensor([[119.0, 118.0] + [-3.0] + [0.0] * 29])
    grid = grid_of(weight, 1)
    assert int(grid.step[0, 0]) == 9 and int(grid.z[0, 0]) == 0
    gram = torch.eye(32)
    gram[0, 1] = gram[1, 0] = -0.999
    pushed = weight.clone()
    pushed[0, 0] = 400.0
    codes = rounded_in_turn(pushed, grid, 1, gram)
    assert int(((codes - grid.z) * grid.step).abs().max()) <= 127
    assert int(codes[0, 0]) == 14


@pytest.mark.parametrize("seed", range(5))
def test_no_row_of_any_shape_leaves_a_byte(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 128, generator=generator) * torch.randn(64, 128, generator=generator).exp()
    weight[:, seed] *= 50
    assert int(whole(weight, PROTECTIVE).abs().max()) <= 127


def test_levels_have_whole_steps_and_zeros_of_their_bits():
    weight = torch.randn(32, 4, 64, generator=torch.Generator().manual_seed(3))
    scale = first_level(weight.flatten(1))
    step, z = second_level(weight, scale)
    assert torch.equal(step, step.round()) and int(step.min()) >= 1 and int(step.max()) <= 16
    assert torch.equal(z, z.round()) and int(z.min()) >= 0 and int(z.max()) <= 15
    scale, z = one_level(weight.flatten(1)[:, None])
    assert bool((scale > 0).all()) and int(z.min()) >= 0 and int(z.max()) <= 15


def test_rows_of_zeros_and_of_one_sign_are_kept():
    weight = torch.zeros(3, 64)
    weight[1], weight[2] = 0.25, -0.5
    for group in (32, 64, 0):
        form = registry.make("weights", Choice("w4a8", {"group": group}))
        got = form.unpack(form.pack(weight))
        assert not got[0].any()
        torch.testing.assert_close(got, weight, rtol=0.07, atol=0.0)


def seen(inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    mixed = torch.randn(inputs, inputs, generator=generator) * 0.3 + torch.eye(inputs)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ mixed
    x *= torch.randn(inputs, generator=generator).exp()
    return x.T @ x


@pytest.mark.parametrize("groups", [0, 2])
def test_ranges_and_roundings_chosen_by_the_inputs_lower_the_error_of_the_output(groups):
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(5)).pow(3)
    gram = seen(128)

    def error(values: torch.Tensor) -> float:
        change = values.reshape(weight.shape) - weight
        return float(((change @ gram) * change).sum())

    parts = weight.view(48, max(1, groups), -1)
    plain, narrow = grid_of(weight, groups), clipped(weight, groups, gram)
    nearest = error(plain.values(plain.codes(parts)))
    chosen = error(narrow.values(narrow.codes(parts)))
    codes = rounded_in_turn(weight, narrow, groups, gram).view(parts.shape)
    assert int(codes.min()) >= 0 and int(codes.max()) <= 15
    assert error(narrow.values(codes)) < 0.8 * chosen < 0.8 * nearest


def test_groups_say_which_sizes_divide():
    for group in (-32, 33, "half", 1.5):
        with pytest.raises(ConfigError, match="multiples of 32"):
            registry.make("weights", Choice("w4a8", {"group": group}))
    form = registry.make("weights", Choice("w4a8", {"group": 128}))
    with pytest.raises(ConfigError, match="64, 32"):
        form.pack(torch.ones(4, 576))
    assert registry.make("weights", "w4a8").groups(576) == 9
    assert registry.make("weights", "w4a8").groups(1536) == 12


def test_a_packed_matrix_takes_the_bytes_that_it_says():
    weight = torch.randn(576, 576, generator=torch.Generator().manual_seed(1))
    bits = {name: 8 * form.pack(weight).nbytes / weight.numel() for name, form in FORMS.items()}
    assert 4.2 < bits["w4a8"] < 4.5 and 4.0 < bits["w4a8 by channel"] < 4.15 and 8.0 < bits["w8a8"] < 8.1


FORMS = {
    "w4a8": registry.make("weights", "w4a8"),
    "w4a8 by channel": registry.make("weights", Choice("w4a8", {"group": 0})),
    "w8a8": registry.make("weights", "w8a8"),
}
