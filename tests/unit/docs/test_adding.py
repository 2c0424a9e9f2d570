"""The example of docs/adding/policy.md is run as it stands."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from tests.unit.engine.harness import Bench

from millstream.core import registry

PAGE = Path(__file__).parents[3] / "docs" / "adding" / "policy.md"


@pytest.fixture
def shortest_prompt(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code, "the page has no python block"
    module = types.ModuleType("millstream_docs_shortest_prompt")
    # The dataclass of the example looks its own module up.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code.group(1), str(PAGE), "exec"), module.__dict__)
    known = registry.module
    monkeypatch.setattr(
        registry,
        "module",
        lambda point, name: module if (point, name) == ("policy", "shortest-prompt") else known(point, name),
    )
    return module


def test_the_example_policy_lets_the_shorter_prompt_start_first(shortest_prompt: types.ModuleType) -> None:
    bench = Bench(policies=["shortest-prompt"])
    long = bench.add(range(20), max_tokens=4)
    short = bench.add(range(3), max_tokens=4)
    bench.run()
    assert bench.first_token_at(short) < bench.first_token_at(long)
    assert bench.output(long) == bench.truth(long) and bench.output(short) == bench.truth(short)
    bench.clean()


def test_the_example_policy_runs_out_of_patience(shortest_prompt: types.ModuleType) -> None:
    choice = registry.Choice("shortest-prompt", {"patience_s": 3.0})
    bench = Bench(policies=[choice], num_blocks=8, meters=(registry.Choice("seats", {"max_rows": 1}), "kv-blocks"))
    long = bench.add(range(20), max_tokens=4)
    for _ in range(12):
        bench.add(range(3), max_tokens=4)
        bench.step()
    bench.run()
    last = max(bench.first_token_at(request) for request in bench.requests.values())
    assert bench.first_token_at(long) < last, "it was let in before the shorter ones that came later"


def test_the_example_card_and_options_are_checked_like_any_other(shortest_prompt: types.ModuleType) -> None:
    assert registry.card("policy", "shortest-prompt").name == "shortest-prompt"
    with pytest.raises(Exception, match="patience_s"):
        registry.make("policy", registry.Choice("shortest-prompt", {"patience": 1}))
