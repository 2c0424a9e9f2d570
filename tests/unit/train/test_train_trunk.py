"""An encoder is trained on lengths: gradients reach it, a file keeps what changed, and predictors read with it."""

from __future__ import annotations

import statistics

import pytest
import torch

import tiny_encoder
from millstream.bench import ranking
from millstream.bench.labels import Label
from millstream.bench.prompts import Prompt
from millstream.cli.main import main
from millstream.core import registry
from millstream.core.errors import BadFile, ConfigError
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.models.lengths import LengthModel, Seen, Trunk, load, read
from millstream.models.packed import write_safetensors
from millstream.ops import table
from millstream.train.lengths import fit, kendall, trained, tune

CAP = 200
WORDS = ("cat", "dog", "house", "paris", "berlin", "france", "capital", "runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("trunk"))


@pytest.fixture
def trunk(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "home"))
    return Trunk(str(folder))


def prompts(count, seed):
    """Texts of seven words, and lengths: whether a cat comes before a dog says more than the words themselves."""
    draw = torch.Generator().manual_seed(seed)
    texts, lengths = [], []
    for _ in range(count):
        words = [WORDS[place] for place in torch.randint(2, len(WORDS), (5,), generator=draw).tolist()]
        pair, at = torch.randint(0, 2, (), generator=draw).item(), torch.randint(0, 5, (), generator=draw).item()
        words[at:at] = ["cat", "dog"] if pair else ["dog", "cat"]
        texts.append(" ".join(words))
        lengths.append(20 + 140 * pair + torch.randint(0, 30, (), generator=draw).item())
    return texts, torch.tensor(lengths)


def begun(trunk, texts, lengths):
    return fit(trunk.vectors(texts).clone(), lengths, CAP)


def trained_on(trunk, texts, lengths, **options):
    ids = [trunk.ids(text) for text in texts]
    return list(tune(trunk, ids, lengths, CAP, begun(trunk, texts, lengths), **options))


def test_gradients_reach_every_weight_that_is_trained_and_the_loss_falls(trunk):
    texts, lengths = prompts(64, 1)
    before = {name: tensor.clone() for name, tensor in trunk.weights().items()}
    # Without decay a weight moves by its gradient only.
    epochs = trained_on(trunk, texts, lengths, epochs=4, rate=1e-3, decay=0.0)
    assert epochs[-1].loss < epochs[0].loss - 0.1
    changed = epochs[-1].changed
    assert set(changed) == {name for name in before if name.startswith("layers.")}
    assert all(not torch.equal(changed[name], before[name]) for name in changed)
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.weights().items()), "the trunk is as it was"
    assert table.in_use() == "auto"


def test_only_the_last_layers_are_trained_where_that_is_asked_for(trunk):
    spec = trunk.encoder.spec
    assert {name.split(".")[1] for name in trained(spec, 1)} == {"2"}
    texts, lengths = prompts(8, 1)
    (tuned,) = trained_on(trunk, texts, lengths, epochs=1, layers=1)
    assert list(tuned.changed) == trained(spec, 1)


def test_what_linear_heads_do_not_see_is_learned_and_the_same_seed_gives_the_same_weights(trunk):
    texts, lengths = prompts(256, 1)
    others, truth = prompts(96, 2)
    plain = kendall(begun(trunk, texts, lengths).scores(trunk.vectors(others)), -truth)
    one, other = (trained_on(trunk, texts, lengths, epochs=4, rate=2e-3, seed=3)[-1] for _ in range(2))
    reader = Trunk(trunk.name, one.changed)
    tau = kendall(begun(reader, texts, lengths).scores(reader.vectors(others)), -truth)
    assert tau > max(0.4, plain + 0.2), (tau, plain)
    assert all(torch.equal(one.changed[name], other.changed[name]) for name in one.changed)


def test_from_lengths_of_other_prompts_nothing_is_learned(trunk):
    texts, lengths = prompts(128, 1)
    others, truth = prompts(96, 2)
    taus = []
    for seed in range(4):
        mixed = lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))]
        tuned = trained_on(trunk, texts, mixed, epochs=2, rate=2e-3, seed=seed)[-1]
        reader = Trunk(trunk.name, tuned.changed)
        taus.append(kendall(begun(reader, texts, mixed).scores(reader.vectors(others)), -truth))
    assert abs(statistics.fmean(taus)) < 0.25, taus


def test_vectors_in_training_are_those_that_are_read_with(folder, monkeypatch):
    # Where products of bfloat16 are native a trunk rounds; in float32 both are the same but for the order of sums.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    trunk = Trunk(str(folder))
    texts, _ = prompts(6, 4)
    with table.use("ref"), torch.inference_mode():
        slow = read(trunk.encoder, [trunk.ids(text) for text in texts])
    torch.testing.assert_close(trunk.vectors(texts), slow, rtol=1e-4, atol=1e-5)


def test_too_few_prompts_are_refused(trunk):
    texts, lengths = prompts(4, 1)
    heads = begun(trunk, texts, lengths)
    with pytest.raises(ValueError, match="at least two prompts"):
        next(tune(trunk, [[2, 3]], lengths[:1], CAP, heads, epochs=1))


# -- files


@pytest.fixture
def model(trunk):
    texts, lengths = prompts(48, 1)
    (tuned,) = trained_on(trunk, texts, lengths, epochs=1, layers=1, rate=1e-2)
    reader = Trunk(trunk.name, tuned.changed)
    rows = reader.vectors(texts).clone()
    return LengthModel(fit(rows, lengths, CAP), Seen(rows, lengths), trunk.name, changed=reader.changed)


def test_a_file_gives_the_scores_that_were_written(model, trunk, tmp_path):
    others, _ = prompts(16, 2)
    path = tmp_path / "lengths.safetensors"
    model.save(path)
    found = load(path)
    assert found.changed.keys() == model.changed.keys()
    scores = found.heads.scores(Trunk(found.trunk, found.changed).vectors(others))
    assert torch.equal(scores, model.heads.scores(Trunk(trunk.name, model.changed).vectors(others)))
    assert not torch.allclose(scores, found.heads.scores(trunk.vectors(others)), atol=1e-2)


def test_the_predictor_reads_with_the_trunk_of_its_file(model, tmp_path):
    path = tmp_path / "lengths.safetensors"
    model.save(path)
    ranker = registry.make("length", Choice("ranker", {"file": str(path)}), text=lambda ids: WORDS[ids[0]])
    hints = ranker.guess([Request(n, (Tokens((n, 1)),), SamplingParams()) for n in range(4)])
    want = model.heads.scores(Trunk(model.trunk, model.changed).vectors(WORDS[:4]))
    assert [one.score for one in hints] == want.tolist()


def test_weights_of_the_trunk_that_are_no_good_are_named(model, tmp_path):
    path, name = tmp_path / "lengths.safetensors", "layers.2.mlp.up.weight"
    good = dict(model.changed)

    def refused(match):
        model.save(path)
        with pytest.raises(BadFile, match=match):
            load(path)

    model.changed = good | {name: good[name][:-1]}
    refused(r"trunk\.layers\.2\.mlp\.up\.weight' is \[79, 48\] of torch\.float32, .* asks for \[80, 48\]")
    model.changed = good | {name: good[name].long()}
    refused("of torch.int64")
    model.changed = good | {name: good[name].clone().fill_(float("nan"))}
    refused("up.weight' holds what is no finite number")
    model.changed = good | {"layers.9.mlp.up.weight": good[name]}
    refused("layers.9.mlp.up.weight' is not part of")


def test_weights_that_a_file_does_not_speak_of_or_has_not_are_named(model, tmp_path):
    path = tmp_path / "lengths.safetensors"
    heads, seen = model.heads, model.seen
    tensors = {
        "score.weight": heads.score,
        "score.bias": heads.score_bias.reshape(1),
        "buckets.weight": heads.buckets,
        "buckets.bias": heads.buckets_bias,
        "seen.vectors": seen.vectors,
        "seen.lengths": seen.lengths,
    }
    told = {"kind": "millstream-lengths", "trunk": model.trunk, "cap": str(CAP)}
    write_safetensors(path, tensors, told | {"changed": '["layers.0.mlp.up.bias"]'})
    with pytest.raises(BadFile, match=r"trunk\.layers\.0\.mlp\.up\.bias' is missing"):
        load(path)
    write_safetensors(path, tensors | {"trunk.layers.0.mlp.up.bias": torch.zeros(80)}, told)
    with pytest.raises(BadFile, match="not among those that changed"):
        load(path)
    write_safetensors(path, tensors, told | {"changed": "3"})
    with pytest.raises(BadFile, match="which weights of its trunk"):
        load(path)
    write_safetensors(path, tensors, told)
    assert load(path).changed == {}, "files from before trunks were trained"


# -- by labels


class Words:
    """Tokens are places in a list of texts."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids):
        return self.texts[ids[0]]


def labelled(families, count=24):
    texts, lengths = prompts(count * len(families), 5)
    found = [
        Label(Prompt(text, families[place % len(families)]), (place,), length, True)
        for place, (text, length) in enumerate(zip(texts, lengths.tolist(), strict=True))
    ]
    return found, Words(texts)


def test_epochs_are_chosen_by_families_that_were_set_aside(trunk):
    labels, tokenizer = labelled(["a", "b", "c", "d", "test"])
    learned = [label for label in labels if label.prompt.family != "test"]
    held = [label for label in labels if label.prompt.family == "test"]
    told = []
    model, orders = ranking.train(
        learned, held, tokenizer, CAP, trunk=trunk, trunk_epochs=2, progress=lambda: told.append(1)
    )
    chosen = model.told["trunk"]
    assert len(chosen["tau"]) == 3 and chosen["tau"][chosen["epoch"]] == max(chosen["tau"])
    assert len(chosen["aside"]) == 1 and set(chosen["aside"]) < set("abcd")
    assert bool(model.changed) == bool(chosen["epoch"]), "a trunk that is no better is not kept"
    assert len(told) <= ranking.progressed(learned, held, 2)
    assert torch.equal(orders["heads only"], ranking.train(learned, held, tokenizer, CAP, trunk=trunk)[1]["ranker"])
    rows = ranking.vectors(model, Trunk(trunk.name, model.changed), tokenizer, learned)
    assert torch.equal(rows, model.seen.vectors), "heads can be fitted anew on vectors by the trunk that is kept"


def test_heads_alone_are_as_before(trunk):
    labels, tokenizer = labelled(["a", "b"])
    model, orders = ranking.train(labels[::2], labels[1::2], tokenizer, CAP, trunk=trunk, trunk_epochs=0)
    assert not model.changed and "heads only" not in orders and "trunk" not in model.told


def test_a_trunk_stays_as_it_is_where_there_is_little_to_choose_by(trunk):
    labels, tokenizer = labelled(["a", "b", "c", "d"], count=ranking.LEAST_ASIDE - 1)
    model, _ = ranking.train(labels, labels, tokenizer, CAP, trunk=trunk, trunk_epochs=1)
    assert not model.changed and model.told["trunk"] == {"epoch": 0, "tau": [], "aside": model.told["trunk"]["aside"]}


def test_families_of_one_data_set_are_set_aside_together():
    families = ["gsm8k", "gsm8k-number", "mbpp", "mbpp-docs", "aqua", "arena-hard"]
    labels, _ = labelled(families)
    for seed in range(8):
        chosen = {labels[place].prompt.family for place in ranking.aside(labels, seed)}
        assert chosen in ({"gsm8k", "gsm8k-number"}, {"mbpp", "mbpp-docs"}, {"aqua"}, {"arena-hard"})
    few, _ = labelled(["a", "b"])
    assert len(ranking.aside(few)) == len(few) // 5


def test_epochs_that_cannot_be_are_refused(trunk, capsys):
    labels, tokenizer = labelled(["a", "b"])
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        ranking.train(labels, (), tokenizer, CAP, trunk=trunk, trunk_epochs=-1)
    assert main(["train-ranker", "smollm2-135m", "--trunk-epochs", "-1"]) != 0
    assert "--trunk-epochs is 0 or more, got -1" in capsys.readouterr().err
