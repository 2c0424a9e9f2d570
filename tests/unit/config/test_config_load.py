"""Reading and merging of configuration: what is wrong is named with its path and its nearest neighbour."""

from __future__ import annotations

import pytest

from millstream.config.load import (
    blamed_on,
    build,
    data_dir,
    home,
    line_of,
    merge,
    parse_bytes,
    parse_sets,
    read_file,
    tree_of,
)
from millstream.config.schema import EngineConfig
from millstream.core.errors import BadFile, ConfigError
from millstream.core.registry import Choice


def test_a_tree_becomes_frozen_config_and_comes_back():
    tree = {
        "model": {"dtype": "bfloat16", "max_context": 512},
        "cache": {"bytes": "1GiB", "prefix": {"name": "radix", "evict": "cost"}, "blocks": 7},
        "sched": {"policies": ["shortest-remaining", {"name": "fcfs"}], "step_tokens": 64},
        "seed": 3,
    }
    config = build(EngineConfig, tree)
    assert config.model.max_context == 512 and config.cache.prefix == Choice("radix", {"evict": "cost"})
    assert config.sched.policies == (Choice("shortest-remaining"), Choice("fcfs"))
    assert build(EngineConfig, tree_of(config)) == config
    assert build(EngineConfig, {}) == EngineConfig()
    assert build(EngineConfig, {"sched": {"policies": "fcfs"}}).sched.policies == (Choice("fcfs"),)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"modle": {}}, ["'modle'", "'model'"]),
        ({"cache": {"blok_size": 4}}, ["'cache.blok_size'", "'cache.block_size'"]),
        ({"cache": {"block_size": "big"}}, ["cache.block_size", "'big'", "an integer", "'auto'"]),
        ({"cache": {"block_size": True}}, ["cache.block_size"]),
        ({"cache": {"block_size": 1.5}}, ["cache.block_size"]),
        ({"model": 3}, ["model", "a table"]),
        ({"decode": 3}, ["decode", "plug-in name"]),
        ({"decode": {"width": 3}}, ["decode", "plug-in name"]),
        ({"sched": {"policies": 3}}, ["sched.policies", "list of plug-in names"]),
        ({"sched": {"policies": [3]}}, ["sched.policies"]),
        ({"seed": "x"}, ["seed", "null"]),
    ],
)
def test_wrong_keys_and_values_are_named_with_their_path(tree, words):
    with pytest.raises(ConfigError) as caught:
        build(EngineConfig, tree)
    for word in words:
        assert word in str(caught.value)


def test_set_arguments_are_json_where_they_can_be_and_text_else():
    pairs = ["cache.block_size=16", "model.dtype=bfloat16", 'sched.policies=["fcfs"]', "seed=null", "a.b.c=x=y"]
    assert parse_sets(pairs) == {
        "cache": {"block_size": 16},
        "model": {"dtype": "bfloat16"},
        "sched": {"policies": ["fcfs"]},
        "seed": None,
        "a": {"b": {"c": "x=y"}},
    }
    for wrong in (["cache"], ["=3"], ["a=1", "a.b=2"]):
        with pytest.raises(ConfigError, match="--set"):
            parse_sets(wrong)


def test_later_trees_win_and_tables_merge():
    low, high = {"a": {"x": 1, "y": 2}, "b": [1], "c": {"z": 1}}, {"a": {"y": 3}, "b": [2], "c": 5}
    assert merge(low, high, {}) == {"a": {"x": 1, "y": 3}, "b": [2], "c": 5}
    assert low == {"a": {"x": 1, "y": 2}, "b": [1], "c": {"z": 1}}
    assert merge() == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("512 MB", 512 * 10**6), ("1.5kib", 1536), ("7", 7), (9, 9), ("2B", 2)],
)
def test_sizes_are_read_with_their_units(text, count):
    assert parse_bytes(text, "cache.bytes") == count


@pytest.mark.parametrize("text", ["", "GiB", "4 pounds", "-1GB", "0", 0, -3, True, "nan", "inf", "1e400"])
def test_what_is_no_size_is_refused_with_its_name(text):
    with pytest.raises(ConfigError, match=r"cache\.bytes"):
        parse_bytes(text, "cache.bytes")


def test_files_are_read_and_their_errors_carry_the_path(tmp_path):
    good = {
        "config.toml": "[cache]\nblocks = 4\n",
        "config.yaml": "cache:\n  blocks: 4\n",
        "config.yml": "cache: {blocks: 4}",
    }
    for name, text in good.items():
        (tmp_path / name).write_text(text)
        assert read_file(tmp_path / name) == {"cache": {"blocks": 4}}
    (tmp_path / "empty.yaml").write_text("")
    assert read_file(tmp_path / "empty.yaml") == {}
    bad = {"a.toml": b"cache = [", "b.yaml": b"a: [", "c.yaml": b"- 1\n- 2\n", "d.toml": b"\xff\xfe"}
    for name, raw in bad.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(BadFile, match=name):
            read_file(tmp_path / name)
    with pytest.raises(BadFile, match="missing"):
        read_file(tmp_path / "missing.toml")


TOML = """
rate = 2.0
# rate = "fast"
[sched]
policies = ["fcfs", 3]
[engine.model]
weight = "blocks"
cache = { blocks = "many", bytes = 4 }
[[tenants]]
rate = 1.0
[[tenants]]
rate = "fast"
"""
YAML = """rate: 2.0
sched:
  policies: [fcfs, 3]
engine:
  model:
    weight: blocks
    cache: {blocks: many}
tenants:
  - rate: 1.0
  -
    rate: fast
"""
JSON = '{"rate": 2.0,\n "sched": {"policies": ["fcfs", 3]},\n "tenants": [{"rate": 1.0},\n {"rate": "fast"}]}'


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [("a.toml", TOML, (2, 5, 7, 8, 12)), ("a.yaml", YAML, (1, 3, 6, 7, 11)), ("a.json", JSON, (1, 2, None, None, 4))],
)
def test_a_setting_is_found_in_its_file(tmp_path, name, text, lines):
    (tmp_path / name).write_text(text)
    settings = {
        "rate": 2.0,
        "engine.sched.policies": 3,
        "engine.model.weight": "blocks",
        "engine.model.cache.blocks": "many",
        "tenants[1].rate": "fast",
    }
    assert tuple(line_of(tmp_path / name, setting, value) for setting, value in settings.items()) == lines
    # What the file does not say is not its fault.
    assert line_of(tmp_path / name, "rate", "fast") is None and line_of(tmp_path / name, "speed", 1) is None
    assert line_of(tmp_path / "gone.toml", "rate", 2.0) is None


def test_an_error_of_a_setting_names_file_and_line_where_it_stands_in_one(tmp_path):
    file = tmp_path / "engine.toml"
    file.write_text("[sched]\nmax_rows = 4\npolicis = 1\n")
    for tree, message in (
        (read_file(file), f"{file}, line 3: there is no setting 'sched.policis'; the nearest is 'sched.policies'"),
        ({"sched": {"max_rows": "four"}}, "sched.max_rows: got 'four'"),
    ):
        with pytest.raises(ConfigError) as caught, blamed_on(file):
            build(EngineConfig, tree)
        assert str(caught.value).startswith(message)


def test_folders_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    monkeypatch.delenv("MILLSTREAM_DATA", raising=False)
    assert home() == tmp_path and data_dir() is None
    (tmp_path / "data").mkdir()
    assert data_dir() == tmp_path / "data"
    monkeypatch.setenv("MILLSTREAM_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("MILLSTREAM_DATA", str(tmp_path / "nowhere"))
    assert data_dir() == tmp_path / "data"
