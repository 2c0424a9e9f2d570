"""Simulations that must come out as they always have, on every machine. What changes them says so in the changelog."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "sim"))
from sim_bench import profile, rows, simulate, traffic

from millstream.core import registry
from millstream.core.registry import Choice
from millstream.sim.replica import EngineSetting
from millstream.sim.simulate import Failure

SWAP = EngineSetting(preemption="swap", host_blocks=100)
VTC = EngineSetting(policies=(Choice("vtc"),))


@pytest.mark.parametrize(
    ("given", "fingerprint"),
    [
        ({}, "be09eba8c0f2e720"),
        ({"setting": SWAP, "profiles": [profile(blocks=60)]}, "582851a76daf509a"),
        ({"setting": VTC, "profiles": [profile(blocks=80)]}, "2fe846722b6d84a0"),
        (
            {"replicas": 2, "router": registry.make("router", "round-robin"), "failures": [Failure(0, 1.0, 1.0)]},
            "bacdc9555e089218",
        ),
    ],
)
def test_a_simulation_comes_out_as_it_always_has(given, fingerprint) -> None:
    assert simulate(traffic(rows(80, 0.02)), **given).fingerprint == fingerprint
