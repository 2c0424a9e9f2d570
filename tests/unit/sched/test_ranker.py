"""The ranker reads prompts by a trained file, and is fitted anew on what was answered since."""

from __future__ import annotations

import pytest
import torch
from harness import Bench

from millstream.core import registry
from millstream.core.errors import BadFile, ConfigError
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.models import lengths as models
from millstream.models.lengths import LengthModel, Seen
from millstream.train.lengths import fit

WIDTH = 8


class Trunk:
    """A text of the number n becomes the n-th direction."""

    def __init__(self, name, changed):
        self.name, self.changed = name, changed
        self.read = []

    def vectors(self, texts):
        self.read += texts
        return torch.nn.functional.one_hot(torch.tensor([int(text) % WIDTH for text in texts]), WIDTH).float()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A model for which texts of 0 to 3 are answered in 10 tokens, and others in 90."""
    monkeypatch.setattr(models, "Trunk", Trunk)
    numbers = torch.arange(160) % WIDTH
    vectors = torch.nn.functional.one_hot(numbers, WIDTH).float()
    answered = torch.where(numbers < 4, 10, 90)
    heads = fit(vectors, answered, 100, epochs=40)
    path = tmp_path / "lengths.safetensors"
    LengthModel(heads, Seen(vectors, answered), trunk="stand-in", frame=("<", ">")).save(path)
    return path


def ranker(file, **options):
    def text(ids):
        return f"<{ids[0]}>"

    return registry.make("length", Choice("ranker", {"file": str(file), **options}), text=text)


def guesses(made, *numbers):
    return made.guess([Request(n, (Tokens((n, 1)),), SamplingParams()) for n in numbers])


def test_prompts_get_a_score_and_the_edge_of_a_bucket(file):
    short, long = guesses(ranker(file), 1, 6)
    assert short.score > long.score
    assert (short.expected_output_len, long.expected_output_len) == (10, 90)


def test_the_frame_of_prompts_is_not_read_and_a_batch_is_read_at_once(file):
    made = ranker(file)
    guesses(made, 1, 6, 3)
    assert made._trunk.read == ["1", "6", "3"]


def test_it_is_fitted_anew_when_nothing_is_under_way(file):
    made = ranker(file, retrain=24, keep=64)
    bench = Bench(lengths=made, context=200, num_blocks=400)
    assert guesses(made, 1)[0].expected_output_len == 10
    made._open.clear()
    # What was short has become long.
    for _ in range(30):
        bench.add([1, 2], 60)
        bench.run()
    assert made.retrained == 1 and len(made.model.seen.lengths) == 64
    assert guesses(made, 1)[0].expected_output_len > 50
    assert guesses(made, 6)[0].expected_output_len == 90, "what was learned before is not forgotten"


def test_without_retraining_nothing_is_kept_of_requests(file):
    made = ranker(file)
    bench = Bench(lengths=made)
    bench.add([1, 2], 4)
    bench.run()
    assert not made._open and not made._new


def test_requests_that_end_leave_nothing_behind(file):
    made = ranker(file, retrain=1000)
    bench = Bench(lengths=made)
    gone = bench.add([1, 2], 40)
    bench.add([2, 2], 4)
    bench.step()
    bench.engine.abort(gone.id)
    bench.run()
    assert not made._open and len(made._new) == 1


def test_what_cannot_be_is_said(file, tmp_path):
    with pytest.raises(ConfigError, match="file"):
        registry.make("length", Choice("ranker"), text=str)
    with pytest.raises(ConfigError, match="history"):
        registry.make("length", Choice("ranker", {"file": str(file)}), text=None)
    with pytest.raises(BadFile):
        ranker(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="sure"):
        ranker(file, sure=1.0)
