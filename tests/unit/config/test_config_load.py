"""Reading and merging of configuration: what is wrong is named with its path and its nearest neighbour."""

from __future__ import annotations

import pytest

from millstream.config.load import build, data_dir, home, merge, parse_bytes, parse_sets, read_file, tree_of
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
