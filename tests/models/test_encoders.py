"""Encoders give transformers' vectors on the same weights, each text the same bits in any company."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_encoder
from millstream.core.errors import BadFile, Unsupported
from millstream.models.load import load_encoder, load_model
from millstream.models.opened import open_model
from millstream.models.source import open_source
from millstream.ops import table
from millstream.ops.ref.ragged import ragged_attention
from millstream.ops.table import Ask
from real import model_path

transformers = pytest.importorskip("transformers")


def texts(count, seed=0, longest=90):
    """Random ids, framed, of lengths that repeat."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest - 1, (count,), generator=generator).tolist()
    lengths[1::4] = lengths[0::4][: len(lengths[1::4])]
    return [[2, *torch.randint(5, 90, (n,), generator=generator).tolist(), 3] for n in lengths]


@torch.inference_mode()
def ours(encoder, ids, types=None):
    start = torch.tensor([0, *map(len, ids)]).cumsum(0).int()
    flat = torch.tensor([token for text in ids for token in text])
    kinds = None if types is None else torch.tensor([one for text in types for one in text])
    return encoder.vectors(encoder.forward(flat, start, kinds), start)


@torch.inference_mode()
def theirs(folder, ids, pool, normalize=True):
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = [pool(model(torch.tensor([text])).last_hidden_state[0]) for text in ids]
    out = torch.stack(rows)
    return torch.nn.functional.normalize(out, dim=-1) if normalize else out


POOLS = {
    "mean_tokens": lambda rows: rows.mean(0),
    "cls_token": lambda rows: rows[0],
    "max_tokens": lambda rows: rows.amax(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "lasttoken": lambda rows: rows[-1],
}


@pytest.mark.parametrize("ops", ["auto", "ref"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLS)
def test_vectors_equal_those_of_transformers(pooling, normalize, ops, tmp_path):
    folder = tiny_encoder.write(tmp_path, pooling=pooling, normalize=normalize)
    with table.use(ops):
        encoder = load_encoder(open_source(folder)).encoder
        got = ours(encoder, ids := texts(9))
    want = theirs(folder, ids, POOLS[pooling], normalize)
    spread = (want - want.mean(0)).abs().max() / want.abs().max()
    assert spread > 0.02, "a model that says the same of all would agree with anything"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "silu"},
        {"num_attention_heads": 3, "layer_norm_eps": 1e-3},
        {"intermediate_size": 37, "num_hidden_layers": 1},
        {"type_vocab_size": 1},
    ],
)
def test_what_a_config_asks_for_is_done(options, tmp_path):
    folder = tiny_encoder.write(tmp_path, pooling=None, **options)
    encoder = load_encoder(open_source(folder)).encoder
    assert encoder.spec.pooling.kind == "mean" and encoder.spec.pooling.normalize
    ids = texts(5, seed=3)
    torch.testing.assert_close(ours(encoder, ids), theirs(folder, ids, POOLS["mean_tokens"]), rtol=1e-5, atol=2e-5)


def test_old_names_and_what_it_was_trained_for_besides_are_known(tmp_path):
    folder = tiny_encoder.write(tmp_path / "new")
    old = tiny_encoder.write(tmp_path / "old")
    made = tiny_encoder.old_names(tiny_encoder.tensors(tiny_encoder.CONFIG, prefix="bert."))
    made["cls.predictions.bias"] = torch.zeros(1)
    made["bert.embeddings.position_ids"] = torch.arange(96)[None].float()
    save_file(made, old / "model.safetensors")
    ids = texts(3)
    pair = [ours(load_encoder(open_source(one)).encoder, ids) for one in (folder, old)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_cross_encoder_scores_pairs_as_transformers_does(labels, tmp_path):
    folder = tiny_encoder.write(tmp_path, labels=labels)
    encoder = load_encoder(open_source(folder)).encoder
    assert encoder.spec.vectors == {"width": labels, "labels": labels}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    pairs, kinds = [], []
    for first, second in zip(texts(4, 1, 40), texts(4, 2, 40), strict=True):
        pairs.append([*first, *second[1:]])
        kinds.append([0] * len(first) + [1] * (len(second) - 1))
    with torch.inference_mode():
        want = torch.cat(
            [
                model(torch.tensor([pair]), token_type_ids=torch.tensor([kind])).logits
                for pair, kind in zip(pairs, kinds, strict=True)
            ]
        )
    got = ours(encoder, pairs, kinds)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(got, ours(encoder, pairs)), "the types have their say"


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_pytorch_tanh"])
def test_a_text_has_the_same_bits_in_any_company(activation, tmp_path):
    encoder = load_encoder(open_source(tiny_encoder.write(tmp_path, hidden_act=activation))).encoder
    ids = texts(24, seed=5)
    whole = ours(encoder, ids)
    alone = [ours(encoder, [text])[0] for text in ids]
    assert torch.equal(torch.stack(alone), whole)
    assert torch.equal(ours(encoder, ids[::-1]).flip(0), whole)
    # Many of the same length are attended to at once, by all threads.
    for text, vector in zip(ids, alone, strict=True):
        assert torch.equal(ours(encoder, [text] * 40), vector.expand(40, -1)), len(text)


def test_attention_gives_a_text_the_same_bits_whichever_thread_has_it():
    attend = ragged_attention.resolve(Ask("cpu", torch.float32, 8))
    for heads, dim in ((6, 8), (1, 48), (12, 32)):
        for length in range(1, 67):
            own = [torch.randn(length, heads, dim) for _ in range(3)]
            alone = attend(*own, torch.tensor([0, length]), dim**-0.5)
            many = attend(*(part.repeat(5, 1, 1) for part in own), torch.arange(6) * length, dim**-0.5)
            assert torch.equal(many, alone.repeat(5, 1, 1)), (heads, dim, length)


def test_minilm_gives_the_vectors_of_transformers():
    folder = model_path("all-minilm-l6-v2")
    opened = open_model(str(folder))
    assert opened.spec.usual_context == 256 and opened.spec.pooling.kind == "mean" and opened.spec.pooling.normalize
    encoder = load_encoder(opened.source).encoder
    tokenizer = opened.tokenizer()
    said = [
        "Hello, wörld!",
        "The quick brown fox jumps over the lazy dog.",
        "naïve café – 北京 is the capital of China; antidisestablishmentarianism 😀",
        "def f(x): return x ** 2  # [MASK] stays text",
        "word " * 250,
    ]
    ids = [tokenizer.encode(text) for text in said]
    library = transformers.AutoTokenizer.from_pretrained(folder)
    for text, own in zip(said, ids, strict=True):
        if "[" not in text:
            assert own == library(text)["input_ids"]
    got, want = ours(encoder, ids), theirs(folder, ids, POOLS["mean_tokens"])
    assert torch.nn.functional.cosine_similarity(got, want).min() > 0.9999
    assert (got - want).abs().max() < 1e-5
    for place, own in enumerate(ids):
        assert torch.equal(ours(encoder, [own])[0], got[place])


# -- refusals


def test_fields_that_are_not_understood_are_refused(tmp_path):
    for options, told in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu6"}, "hidden_act"),
        ({"some_new_thing": 3}, "some_new_thing"),
    ):
        folder = tmp_path / told
        tiny_encoder.write(folder)
        (folder / "config.json").write_text(json.dumps({**tiny_encoder.CONFIG, **options}))
        with pytest.raises(Unsupported, match=told):
            open_model(str(folder))
    folder = tiny_encoder.write(tmp_path / "heads")
    (folder / "config.json").write_text(json.dumps({**tiny_encoder.CONFIG, "num_attention_heads": 7}))
    with pytest.raises(BadFile, match="num_attention_heads"):
        open_model(str(folder))


def test_tensors_that_are_missing_too_many_or_misshapen_are_named(tmp_path):
    folder = tiny_encoder.write(tmp_path)
    good = load_file(folder / "model.safetensors")
    for change, told in (
        (lambda t: t.pop("encoder.layer.1.attention.self.key.bias"), "layers.1.attn.k.bias"),
        (lambda t: t.update({"encoder.layer.9.output.dense.bias": torch.zeros(48)}), "encoder.layer.9"),
        (
            lambda t: t.update({"embeddings.position_embeddings.weight": torch.zeros(95, 48)}),
            r"position_embeddings.*95",
        ),
    ):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BadFile, match=told):
            load_encoder(open_source(folder))


def test_what_sentence_transformers_says_is_read_with_care(tmp_path):
    folder = tiny_encoder.write(tmp_path, max_seq_length=40)
    assert open_model(str(folder)).spec.usual_context == 40
    modules, pooling = folder / "modules.json", folder / "1_Pooling" / "config.json"
    for file, content, error, told in (
        (pooling, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, Unsupported, "pooling"),
        (pooling, {"pooling_mode_weightedmean_tokens": True}, Unsupported, "pooling"),
        (pooling, {"pooling_mode": 3}, Unsupported, "pooling"),
        (modules, [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], Unsupported, "Dense"),
        (modules, [{"type": "sentence_transformers.models.Transformer", "path": ""}], BadFile, "Pooling"),
        (modules, [{"type": "sentence_transformers.models.Pooling", "path": "../x"}], BadFile, "folder"),
        (modules, [{"type": "sentence_transformers.models.Pooling", "path": "none"}], BadFile, "missing"),
        (modules, {"not": "a list"}, BadFile, "list"),
        (folder / "sentence_bert_config.json", {"max_seq_length": "long"}, BadFile, "max_seq_length"),
    ):
        before = file.read_text()
        file.write_text(json.dumps(content))
        with pytest.raises(error, match=told):
            open_model(str(folder))
        file.write_text(before)
    pooling.write_text(json.dumps({"pooling_mode": "cls", "embedding_dimension": 48}))
    assert open_model(str(folder)).spec.pooling.kind == "cls"


def test_each_loader_refuses_the_other_kind(tmp_path):
    folder = tiny_encoder.write(tmp_path)
    with pytest.raises(Unsupported, match="encoder"):
        load_model(open_source(folder))
