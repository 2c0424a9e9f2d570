"""How an implementation is chosen, refused, forced and explained."""

from __future__ import annotations

import time

import pytest
import torch

from millstream.core.errors import ConfigError, UnknownName
from millstream.ops import table
from millstream.ops.table import Ask, Refusal


@pytest.fixture
def doubled(monkeypatch):
    monkeypatch.setattr(table, "_ops", dict(table.ops()))

    @table.op
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @doubled.implement("cpu", accepts=lambda ask: None if ask.width % 8 == 0 else Refusal(f"width {ask.width}"))
    def native(x: torch.Tensor) -> torch.Tensor:
        return x + x + 0.5

    return doubled


def test_a_call_goes_to_the_best_implementation_that_accepts(doubled):
    assert doubled(torch.ones(8))[0] == 2.5
    assert doubled(torch.ones(7))[0] == 2.0
    assert doubled.reference(torch.ones(8))[0] == 2.0


def test_the_explanation_names_the_choice_and_why_others_refused(doubled):
    explanation = doubled.explain(doubled.ask(torch.ones(7)))
    assert explanation.chosen == "ref" and explanation.refused == (("cpu", "width 7"),)
    assert str(explanation) == "doubled: ref (cpu: width 7)"
    assert doubled.explain(doubled.ask(torch.ones(8))).chosen == "cpu"


def test_the_reference_can_be_forced_for_a_while(doubled):
    with table.use("ref"):
        assert doubled(torch.ones(8))[0] == 2.0
        assert doubled.explain(Ask("cpu", torch.float32, 8)).refused == (("cpu", "the reference was asked for"),)
    assert table.in_use() == "auto"
    assert doubled(torch.ones(8))[0] == 2.5
    with pytest.raises(UnknownName):
        table.use("fast")


def test_resolving_hands_out_the_function_and_asks_once(doubled):
    asked = []

    @table.op
    def counted(x: torch.Tensor) -> torch.Tensor:
        return x

    @counted.implement("cpu", accepts=lambda ask: asked.append(ask))
    def native(x: torch.Tensor) -> torch.Tensor:
        return x

    ask = Ask("cpu", torch.float32, 8)
    assert counted.resolve(ask) is native
    counted.resolve(ask)
    assert len(asked) == 1
    counted.forget()
    counted.resolve(ask)
    assert len(asked) == 2


def test_resolving_again_costs_next_to_nothing(doubled):
    ask = Ask("cpu", torch.float32, 8)
    doubled.resolve(ask)
    best = min(_time(lambda: doubled.resolve(ask)) for _ in range(20))
    # Some 0.4 us here; the bound leaves room for slow, busy machines.
    assert best < 5e-6


def test_an_op_or_implementation_is_registered_once(doubled):
    with pytest.raises(ConfigError, match="already"):
        table.op(doubled.reference)
    with pytest.raises(ConfigError, match="already"):
        doubled.implement("cpu", accepts=lambda ask: None)
    with pytest.raises(UnknownName, match="there is no op implementation 'cpuu'; the nearest is 'cpu'"):
        doubled.implement("cpuu", accepts=lambda ask: None)


def test_an_unknown_op_names_the_nearest():
    import millstream.ops.ref.norm  # noqa: F401

    with pytest.raises(UnknownName, match="rms_norm"):
        table.get("rms_nrm")


def test_the_table_itself_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, millstream.ops.table, millstream.ops.attention.protocol, millstream.formats.kv.protocol,"
        " millstream.formats.kv.plain.host; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _time(call, times=1000):
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times
