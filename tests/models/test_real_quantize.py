"""SmolLM2 packed: its perplexity, calibrated on other text than it is measured on, through `LLM.score`."""

from __future__ import annotations

import gzip
import math

import pytest

import real
from millstream.engine.llm import LLM
from millstream.models.opened import open_model
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.run import float_tensors, quantize
from millstream.models.quantize.save import save

NAME = "smollm2-135m"
WINDOW = 512


def perplexity(path: str, num_windows: int) -> float:
    text = gzip.decompress(real.data_file("lm_perplexity", "wikitext2_test.txt.gz").read_bytes()).decode()
    with LLM(path, max_context=WINDOW) as llm:
        ids = llm.tokenizer.encode(text[: 8 * num_windows * WINDOW])
        scores = llm.score([ids[i * WINDOW : (i + 1) * WINDOW] for i in range(num_windows)])
    return math.exp(-sum(score.logprob for score in scores) / sum(score.num_scored for score in scores))


def packed(recipe: Recipe, folder) -> str:
    opened = open_model(str(real.model_path(NAME)))
    tokens = []
    if recipe.needs_text:
        text = gzip.decompress(real.data_file("lm_train", "wikitext2_train_5k.txt.gz").read_bytes()).decode()
        tokens = opened.tokenizer().encode(text[:600_000])
    spec, tensors = float_tensors(opened.source)
    save(opened, *quantize(spec, tensors, recipe, tokens), recipe, folder)
    return str(folder)


def test_eight_bits_rounded_to_nearest_lose_little(tmp_path):
    whole = perplexity(str(real.model_path(NAME)), 2)
    got = perplexity(packed(Recipe.plain("w8a8"), tmp_path / "w8a8"), 2)
    print(f"perplexity {whole:.3f}, w8a8 {got:.3f}")
    assert got < 1.05 * whole


@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_bits_calibrated_lose_less_than_half_of_what_rounding_to_nearest_loses(tmp_path):
    whole = perplexity(str(real.model_path(NAME)), 8)
    nearest = perplexity(packed(Recipe.plain("w4a8"), tmp_path / "rtn"), 8)
    got = perplexity(packed(Recipe("w4a8"), tmp_path / "qoq"), 8)
    print(f"perplexity {whole:.3f}, w4a8 to nearest {nearest:.3f}, calibrated {got:.3f}")
    assert got - whole < 0.5 * (nearest - whole)
    assert got < 1.12 * whole
