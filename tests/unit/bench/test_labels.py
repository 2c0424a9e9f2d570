"""Lengths that were measured are kept by what they are of, and prompts come by families."""

from __future__ import annotations

import json

import pytest

from millstream.bench import labels, prompts, ranking
from millstream.bench.labels import Serving
from millstream.bench.prompts import Prompt
from millstream.core.errors import BadFile, UnknownName


def line(serving, text, tokens):
    return json.dumps({"key": serving.key(text), "prompt": text, "family": "f", "tokens": tokens, "ended": True})


def test_a_label_counts_for_its_model_formats_cap_and_sampling_only(tmp_path):
    serving, path = Serving("m", 64), tmp_path / "labels.jsonl"
    path.write_text(line(serving, "one", 7) + "\n")
    asked = [Prompt("one", "f"), Prompt("two", "f")]
    assert labels.missing(serving, asked, path) == asked[1:]
    blocks = Serving("m", 64, formats="blocks int8")
    for other in (Serving("n", 64), Serving("m", 65), Serving("m", 64, 0.5), Serving("m", 64, 1.0, 0.5), blocks):
        assert labels.missing(other, asked, path) == asked
    # The same draw, whose outcome is another one with other numbers.
    assert serving.params("one").seed == blocks.params("one").seed != serving.params("two").seed
    assert serving.params("one").max_tokens == 64


def test_a_line_that_was_cut_short_is_forgotten_and_one_that_is_wrong_is_named(tmp_path):
    serving, path = Serving("m", 64), tmp_path / "labels.jsonl"
    path.write_text(line(serving, "one", 7) + "\n" + line(serving, "two", 9)[:20])
    assert labels.read(path) == {serving.key("one"): (7, True)}
    assert path.read_text() == line(serving, "one", 7) + "\n"
    path.write_text("nonsense\n" + line(serving, "one", 7) + "\n")
    with pytest.raises(BadFile, match="line 1"):
        labels.read(path)


def test_prompts_of_a_file_have_families_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "family": "x"}\n"b"\n\n{"prompt": "a", "family": "x"}\n')
    assert prompts.from_file(path) == [Prompt("a", "x"), Prompt("b", "mine.jsonl")]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(BadFile, match="line 2"):
        prompts.from_file(path)
    path.write_text("\n")
    with pytest.raises(BadFile, match="no prompts"):
        prompts.from_file(path)
    with pytest.raises(UnknownName, match="gsm8k"):
        prompts.family("gsm8kk")


def test_what_all_prompts_begin_and_end_with_is_their_frame():
    assert ranking.frame(["user\nhi\nassistant\n", "user\nyou\nassistant\n"]) == ("user\n", "\nassistant\n")
    assert ranking.frame(["same", "same"]) == ("same", "")
    assert ranking.frame(["abc", "xyc"]) == ("", "c")


def test_no_family_is_both_learned_from_and_tested_on():
    assert not set(ranking.TRAIN) & set(ranking.TEST)
    assert set(ranking.TRAIN) | set(ranking.TEST) == set(prompts.FAMILIES)
    learned, tested = ({prompts.FAMILIES[name][0] for name in part} for part in (ranking.TRAIN, ranking.TEST))
    assert not learned & tested, "nor a data set"
