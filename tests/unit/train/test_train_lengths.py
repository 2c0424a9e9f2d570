"""Orders and buckets are learned from lengths, kept in a file, and nothing is learned where there is nothing."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from millstream.core.errors import BadFile
from millstream.models.lengths import LengthModel, Seen, load
from millstream.models.packed import write_safetensors
from millstream.train.lengths import fit, kendall, listmle


def prompts(count, seed, cap=200):
    """Vectors of length 1 of which one direction tells the length, and a little noise."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(count, 16, generator=draw), dim=-1)
    lengths = (cap * torch.sigmoid(6 * vectors[:, 3] + 0.3 * torch.randn(count, generator=draw))).long().clamp(min=1)
    return vectors, lengths


def test_an_order_is_learned_and_holds_for_prompts_that_were_not_seen():
    vectors, lengths = prompts(400, 1)
    others, truth = prompts(100, 2)
    heads = fit(vectors, lengths, 200, epochs=60, decay=0.01)
    assert kendall(heads.scores(others), -truth) > 0.7
    told = torch.tensor(heads.lengths(others))
    assert kendall(told, truth) > 0.6
    assert set(told.tolist()) <= set(range(20, 201, 20)), "upper edges of ten buckets"


def test_from_lengths_of_other_prompts_nothing_is_learned():
    vectors, lengths = prompts(400, 1)
    others, truth = prompts(200, 2)
    # One shuffle says something by chance: the mean of many does not.
    taus = []
    for seed in range(8):
        mixed = lengths[torch.randperm(400, generator=torch.Generator().manual_seed(seed))]
        taus.append(kendall(fit(vectors, mixed, 200).scores(others), -truth))
    assert abs(statistics.fmean(taus)) < 0.2


def test_scores_are_on_one_scale_and_the_same_seed_gives_the_same_heads():
    vectors, lengths = prompts(300, 1)
    one, other = fit(vectors, lengths, 200, seed=4), fit(vectors, lengths, 200, seed=4)
    assert torch.equal(one.score, other.score) and torch.equal(one.buckets, other.buckets)
    scores = one.scores(vectors)
    assert abs(float(scores.mean())) < 1e-4 and float(scores.std()) == pytest.approx(1, abs=1e-3)


def test_being_surer_expects_no_shorter_outputs():
    vectors, lengths = prompts(300, 1)
    heads = fit(vectors, lengths, 200)
    usual, sure = heads.lengths(vectors, 0.5), heads.lengths(vectors, 0.95)
    assert all(a <= b for a, b in zip(usual, sure, strict=True)) and sum(sure) > sum(usual)
    covered = sum(int(length) <= edge for length, edge in zip(lengths, sure, strict=True))
    assert covered > 0.85 * len(lengths)


def test_listmle_is_least_for_the_true_order():
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, 2, 1, 0])
    losses = {
        order: float(listmle(torch.tensor([float(one) for one in order]), labels, draw))
        for order in itertools.permutations(range(4))
    }
    assert min(losses, key=losses.__getitem__) == (3, 2, 1, 0)
    assert max(losses, key=losses.__getitem__) == (0, 1, 2, 3)


def test_kendall_is_what_counting_pairs_gives():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 6, (40,), generator=draw), torch.randint(0, 6, (40,), generator=draw)
    agree = ties_a = ties_b = 0
    for i, j in itertools.combinations(range(40), 2):
        x, y = int((a[i] - a[j]).sign()), int((b[i] - b[j]).sign())
        agree, ties_a, ties_b = agree + x * y, ties_a + (x != 0), ties_b + (y != 0)
    assert kendall(a, b) == pytest.approx(agree / (ties_a * ties_b) ** 0.5)
    assert kendall(a, a) == pytest.approx(1) and kendall(a, -a) == pytest.approx(-1)
    assert kendall(a, torch.zeros(40)) == 0


def test_too_few_prompts_are_refused():
    vectors, lengths = prompts(4, 1)
    with pytest.raises(ValueError, match="at least two prompts"):
        fit(vectors[:1], lengths[:1], 200)
    with pytest.raises(ValueError, match="4 and 3"):
        fit(vectors, lengths[:3], 200)


def test_a_model_is_read_as_it_was_written(tmp_path):
    vectors, lengths = prompts(50, 1)
    heads = fit(vectors, lengths, 200)
    model = LengthModel(heads, Seen(vectors, lengths), served="some-model", frame=("user\n", "\nassistant"))
    model.told = {"tau": {"ranker": 0.5}}
    model.save(tmp_path / "deep" / "lengths.safetensors")
    found = load(tmp_path / "deep" / "lengths.safetensors")
    assert torch.equal(found.heads.scores(vectors), heads.scores(vectors))
    assert found.heads.lengths(vectors) == heads.lengths(vectors)
    assert torch.equal(found.seen.lengths, lengths) and found.told == model.told and found.served == "some-model"
    assert found.bare("user\nhello\nassistant") == "hello" and found.bare("other") == "other"


def test_files_that_are_none_say_so(tmp_path):
    other = tmp_path / "other.safetensors"
    write_safetensors(other, {"a": torch.zeros(2)})
    with pytest.raises(BadFile, match="train-ranker"):
        load(other)
    vectors, lengths = prompts(10, 1)
    heads = fit(vectors, lengths, 200)
    heads.buckets_bias = torch.zeros(3)
    LengthModel(heads, Seen(vectors, lengths)).save(tmp_path / "odd.safetensors")
    with pytest.raises(BadFile, match="do not fit together"):
        load(tmp_path / "odd.safetensors")
    with pytest.raises(BadFile, match="missing"):
        load(tmp_path / "nowhere")
