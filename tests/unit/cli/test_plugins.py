"""Plug-ins are listed from their source."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from millstream.cli.main import main
from millstream.cli.plugins import options
from millstream.core import registry


def test_all_plugins_are_listed_with_their_options(capsys):
    assert main(["plugins", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    rows = json.loads(out)["plugins"]
    assert {"policy", "meter", "prefix", "kv", "decode", "family"} <= {row["point"] for row in rows}
    meter = next(row for row in rows if (row["point"], row["name"]) == ("meter", "splitfuse"))
    assert meter["paper"] == 19 and meter["lossless"] is True
    assert [one["name"] for one in meter["options"]] == ["budget"]


def test_one_point_can_be_asked_for(capsys):
    assert main(["plugins", "policy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["policy"] * len(registry.names("policy"))


def test_an_unknown_point_names_the_nearest(capsys):
    assert main(["plugins", "polcy"]) == 1
    assert "there is no extension point 'polcy'; the nearest is 'policy'" in capsys.readouterr().err


@pytest.mark.parametrize("point", ["policy", "meter", "prefix", "evict"])
def test_the_options_that_are_read_are_those_that_work(point):
    for name in registry.names(point):
        config = getattr(registry.module(point, name), "Config", None)
        fields = [] if config is None else list(config.__dataclass_fields__)
        assert [one["name"] for one in options(point, name)] == fields


def test_listing_plugins_imports_no_torch():
    code = "import sys; from millstream.cli.main import main; main(['plugins']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
