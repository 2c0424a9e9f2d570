"""Clocks do not go back."""

import pytest

from millstream.core.clock import VirtualClock, WallClock


def test_a_virtual_clock_moves_when_told_to_and_never_back():
    clock = VirtualClock(2.0)
    clock.advance(1.5)
    clock.advance(0)
    assert clock.now() == 3.5
    with pytest.raises(ValueError, match="go back"):
        clock.advance(-1)


def test_the_wall_clock_does_not_fall():
    clock = WallClock()
    assert clock.now() <= clock.now()
