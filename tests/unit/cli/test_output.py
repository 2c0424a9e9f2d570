"""What commands print."""

from __future__ import annotations

import json
import math

import pytest

from millstream.cli.demo import _bar, _first_words
from millstream.cli.output import (
    _plain_progress,
    emit,
    json_only,
    memory_in_words,
    print_table,
    seconds_in_words,
    size_in_words,
)


def test_json_is_one_line_and_numbers_that_json_lacks_are_null(capsys):
    emit({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": "two\nlines"}})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "c": {"d": "two\nlines"}}


def test_while_json_is_on_other_prints_go_to_stderr(capsys):
    with json_only(True):
        print("progress")
        emit({"done": True})
        print("more progress")
    out, err = capsys.readouterr()
    assert out == '{"done": true}\n'
    assert err == "progress\nmore progress\n"


def test_json_off_leaves_stdout_alone(capsys):
    with json_only(False):
        print("words")
    assert capsys.readouterr().out == "words\n"


@pytest.mark.parametrize(
    "size, words",
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.36 MB"), (1_117_320_768, "1.12 GB"), (5e12, "5000.00 GB")],
)
def test_sizes_are_in_decimal_units(size, words):
    assert size_in_words(size) == words


@pytest.mark.parametrize("size, words", [(1024, "1 KiB"), (3 << 20, "3.00 MiB"), (5 << 30, "5.00 GiB")])
def test_memory_is_in_binary_units(size, words):
    assert memory_in_words(size) == words


@pytest.mark.parametrize("seconds, words", [(None, "-"), (math.nan, "-"), (0.0123, "12.3 ms"), (2.5, "2.50 s")])
def test_seconds_read_well(seconds, words):
    assert seconds_in_words(seconds) == words


def test_a_table_without_a_terminal_is_plain_columns(capsys):
    print_table(("name", "count"), [("a", 1), ("long name", 1000)], right=(1,))
    assert capsys.readouterr().out == "name       count\na              1\nlong name   1000\n"


def test_progress_without_a_terminal_says_each_stage_once(capsys):
    show = _plain_progress("m", every_s=60)
    for done in range(0, 1000, 100):
        show("download", done, 1000)
    show("verify", 0, 1000)
    assert capsys.readouterr().err.splitlines() == ["m: download 0 B of 1 KB", "m: verify 0 B of 1 KB"]


@pytest.mark.parametrize(
    "parts", [[], [(0, "a")], [(1, "a"), (1, "b")], [(999, "a"), (1, "b")], [(500, "a"), (500, "b")]]
)
def test_a_bar_always_has_its_width(parts):
    assert sum(len(cells) for cells, _ in _bar(parts, 1000, 40)) == 40
    assert sum(len(cells) for cells, _ in _bar(parts, 0, 40)) == 40


def test_a_little_of_something_is_seen_in_a_bar():
    assert _bar([(1, "a")], 1000, 40)[0] == ("█", "a")


def test_of_a_long_prompt_the_line_that_asks_is_shown():
    assert _first_words("a letter\n\nWhat does it say?", 40) == "What does it say?"
    assert len(_first_words("x" * 100, 42)) == 42
