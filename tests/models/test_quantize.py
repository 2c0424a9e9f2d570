"""Packing a model: changes that leave it alone, folders that load, and what is said of bad ones."""

from __future__ import annotations

import json
import shutil

import paged
import pytest
import tiny
import torch

from millstream.core.errors import BadFile, ConfigError, UnknownName, Unsupported
from millstream.models.blocks.linear import weight_format
from millstream.models.decoder import build
from millstream.models.load import load_model
from millstream.models.opened import Opened, model_spec
from millstream.models.packed import packed_names, packed_spec
from millstream.models.quantize.observe import contexts, observe
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.run import changed, float_tensors, quantize
from millstream.models.quantize.save import save
from millstream.models.quantize.transforms import smooth_attention
from millstream.models.source import open_source
from millstream.ops.cpu import program as native

TOKENS = [(31 * i * i + 7) % 199 for i in range(480)]
# Biases, norms of q and k with and without an offset, norms behind, windows, tied and untied heads, experts.
FAMILIES = ("llama-biases", "qwen2", "qwen3", "gemma3", "mixtral")
SMALL = {"samples": 6, "length": 64}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    case = tiny.case(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    tiny.write(tiny.Case(case.name, case.family, case.model, {**case.options, "intermediate_size": 96}), folder)
    return open_source(folder)


def logits(decoder, kv="plain", backend="torch-ref"):
    return paged.Row(decoder, 70, backend, kv).run(TOKENS[:70], 0, 70)


def floats(spec, tensors, recipe):
    """The model after a recipe's changes, nothing rounded."""
    made = dict(tensors)
    for index, weights, _ in changed(spec, tensors, recipe, TOKENS):
        made |= {f"layers.{index}.{name}": tensor for name, tensor in weights.items()}
    return made


@pytest.mark.parametrize("piece", ["smooth_attention", "smooth_outputs", "reorder"])
def test_a_change_leaves_the_model_alone(source, piece):
    spec, tensors = float_tensors(source)
    recipe = Recipe.plain("w4a8", group=32 if piece == "reorder" and spec.family != "mixtral" else "auto", **SMALL)
    made = floats(spec, tensors, Recipe(**{**recipe.said(), piece: True}))
    same = all(torch.equal(made[name], tensors[name]) for name in tensors)
    assert same == (piece == "reorder" and spec.family == "mixtral")
    torch.testing.assert_close(logits(build(spec, made)), logits(build(spec, tensors)), rtol=1e-3, atol=2e-3)


def test_keys_are_smoother_afterwards_by_the_square_root(source):
    spec, tensors = float_tensors(source)
    with torch.inference_mode():
        decoder = build(spec, tensors)
        step, streams = contexts(decoder, 64), [decoder.embed(torch.tensor(TOKENS[:64]))]
        before = observe(decoder.layers[0], [streams[0].clone()], step)
        weights = {n.removeprefix("layers.0."): t for n, t in tensors.items() if n.startswith("layers.0.")}
        said = before.keys.clone()
        smooth_attention(spec.layers[0], weights, before)
        again = build(spec, tensors | {f"layers.0.{name}": tensor for name, tensor in weights.items()})
        after = observe(again.layers[0], [streams[0].clone()], contexts(again, 64)).keys
    torch.testing.assert_close(after, before.keys, rtol=1e-3, atol=1e-4)
    assert after.amax() / after.amin() < said.amax() / said.amin()


@pytest.mark.parametrize("form", ["w8a8", "w4a8", "block4"])
def test_a_packed_folder_loads_as_the_model_that_was_packed(source, form, tmp_path):
    spec, tensors = float_tensors(source)
    recipe = Recipe(form, **SMALL)
    made_spec, made = quantize(spec, tensors, recipe, TOKENS)
    folder = tmp_path / "packed"
    size = save(Opened(source, spec), made_spec, made, recipe, folder)
    assert size == sum(file.stat().st_size for file in folder.iterdir())
    again = open_source(folder)
    assert again.quantization == form and again.packing["recipe"]["format"] == form
    loaded = load_model(again)
    assert loaded.spec.layers == made_spec.layers and loaded.spec.embed_format == made_spec.embed_format
    assert loaded.report.copied_bytes == 0
    assert torch.equal(logits(loaded.decoder), logits(build(made_spec, made)))
    held = loaded.decoder.format_bytes()
    assert held[form] > 0 and (spec.family == "mixtral") == ("dense" in held)
    # Mapped from the file, not copies of it: each stream begins at a multiple of 64 bytes.
    streams = [t for name, t in loaded_tensors(again, loaded.spec).items() if name.endswith(".stream")]
    assert all(stream.data_ptr() % 64 == 0 for stream in streams)


def loaded_tensors(source, spec):
    from millstream.models.packed import packed_tensors

    return packed_tensors(source, spec)


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_what_is_packed_computes_as_the_floats_it_stands_for(source, form):
    spec, tensors = float_tensors(source)
    made_spec, made = quantize(spec, tensors, Recipe.plain(form))
    stood_for = dict(tensors)
    for name, held in packed_names(made_spec).items():
        one = weight_format(held)
        stood_for[f"{name}.weight"] = one.unpack(one.load(made, name))
    want, got = logits(build(spec, stood_for)), logits(build(made_spec, made))
    # What is left is the rounding of activations.
    assert (got - want).abs().mean() < 0.15 * want.abs().mean()


def test_a_packed_model_runs_as_one_call_where_it_can(source):
    if native.refusal() is not None:
        pytest.skip("no program here")
    spec, tensors = float_tensors(source)
    program = build(*quantize(spec, tensors, Recipe.plain("w4a8"))).program
    assert hasattr(program, "forward") != (spec.family == "mixtral")


# -- what is wrong


def test_recipes_name_what_does_not_exist():
    with pytest.raises(UnknownName, match="'w4a8'"):
        Recipe("w4a9")
    with pytest.raises(UnknownName):
        Recipe(head="none")
    with pytest.raises(ConfigError, match="no groups"):
        Recipe("w8a8", group=64)
    with pytest.raises(ConfigError, match="multiples of 32"):
        Recipe("w4a8", group=48)
    with pytest.raises(ConfigError, match="samples"):
        Recipe(samples=0)


def test_what_a_model_or_a_text_has_not_is_said_before_work_begins(source):
    spec, tensors = float_tensors(source)
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.qkv: groups of 64 do not divide 48"):
        quantize(spec, tensors, Recipe("w4a8", group=64, **SMALL), TOKENS)
    with pytest.raises(ConfigError, match="10 tokens"):
        quantize(spec, tensors, Recipe(**SMALL), TOKENS[:10])
    with pytest.raises(ConfigError, match="context"):
        quantize(spec, tensors, Recipe(samples=1, length=100000), TOKENS)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "m"
    tiny.write(tiny.Case("llama", "llama", "Llama", {"intermediate_size": 96}), folder)
    source = open_source(folder)
    spec, tensors = float_tensors(source)
    recipe = Recipe.plain("w4a8")
    save(Opened(source, spec), *quantize(spec, tensors, recipe), recipe, folder.parent / "packed")
    return folder.parent / "packed"


def edited(packed, tmp_path, **changes):
    folder = tmp_path / "edited"
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tensors(packed, tmp_path, change):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "edited"
    shutil.copytree(packed, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


QKV = "layers.0.attn.qkv"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{QKV}.stream"), "missing"),
        (lambda t: t.update({"more": torch.ones(1)}), "'more' is not part"),
        (lambda t: t.update({f"{QKV}.stream": t[f"{QKV}.stream"][:, :-64].contiguous()}), "is not a w4a8 matrix"),
        (lambda t: t.update({f"{QKV}.stream": t[f"{QKV}.stream"].float()}), "stored as F32"),
        (lambda t: t.update({f"{QKV}.shape": torch.tensor([48, 48])}), "w4a8 matrix"),
        (lambda t: t.update({f"{QKV}.shape": torch.tensor([79, 48])}), "the config asks for"),
        (lambda t: t.update({f"{QKV}.shape": torch.tensor([-1, 48])}), "w4a8 matrix"),
        (lambda t: t.update({"final_norm.weight": torch.ones(3)}), "has shape"),
        (lambda t: t.update({"embed.shape": torch.tensor([7, 48])}), "block8 matrix"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(packed, tmp_path, change, match):
    with pytest.raises(BadFile, match=match) as told:
        load_model(open_source(with_tensors(packed, tmp_path, change)))
    assert "edited" in str(told.value)


def test_a_config_that_cannot_be_is_refused(packed, tmp_path):
    for changes, kind, match in (
        ({"version": 2}, Unsupported, "version 2"),
        ({"matrices": {"format": "w4a9", "bits": 4}}, BadFile, "'w4a8'"),
        ({"matrices": None}, BadFile, "no format"),
        ({"matrices": {"format": "w4a8", "bits": "four"}}, BadFile, "bits"),
        ({"matrices": {"format": "w8a8", "bits": 8}}, BadFile, "w8a8 matrix"),
        ({"quant_method": "gptq"}, Unsupported, "gptq"),
    ):
        folder = edited(packed, tmp_path / match.strip("'"), **changes)
        with pytest.raises(kind, match=match):
            load_model(open_source(folder))


def test_a_packed_folder_takes_no_other_way_to_keep_weights(packed, tmp_path):
    source = open_source(packed)
    for options in ({"weights": "blocks"}, {"dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match="w4a8"):
            load_model(source, **options)
    with pytest.raises(ConfigError, match="packed"):
        float_tensors(source)


def test_nothing_is_overwritten(packed):
    source = open_source(packed.parent / "m")
    spec, tensors = float_tensors(source)
    recipe = Recipe.plain("w8a8")
    before = sorted(packed.iterdir())
    with pytest.raises(ConfigError, match="exists already"):
        save(Opened(source, spec), *quantize(spec, tensors, recipe), recipe, packed)
    assert sorted(packed.iterdir()) == before
    assert not [path for path in packed.parent.iterdir() if path.name.startswith(".")]


def test_a_spec_from_headers_knows_its_formats_and_bytes(packed):
    spec = model_spec(open_source(packed))
    assert set(packed_names(spec).values()) == {"w4a8", "block8"}
    held = load_model(open_source(packed))
    assert spec.weight_bytes("float32") == pytest.approx(held.report.weight_bytes, rel=0.02)
    assert packed_spec(spec, open_source(packed)).layers == spec.layers
