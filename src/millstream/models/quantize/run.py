"""All of it in order: layer after layer is watched, changed, packed, and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from millstream.core import registry
from millstream.core.errors import ConfigError
from millstream.models.cache import load_tensors
from millstream.models.decoder import build
from millstream.models.families.protocol import find_family
from millstream.models.load import prepare
from millstream.models.opened import model_spec
from millstream.models.packed import packed_names, packing_of, spec_in
from millstream.models.quantize.observe import LayerSeen, contexts, observe
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.transforms import Weights, reorder, smooth_attention, smooth_outputs
from millstream.models.source import ModelSource
from millstream.models.spec import ModelSpec

Progress = Callable[[str, int, int], None]


def float_tensors(source: ModelSource) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The spec and the float32 tensors of a model that is not packed yet. Raises ConfigError, BadFile, Unsupported."""
    if source.packing:
        raise ConfigError(
            f"{source.id} is packed as {source.quantization} already; quantize the model it was made from"
        )
    family = find_family(source.config)
    spec = model_spec(source, family)
    return spec, prepare(source, family, spec, load_tensors(source))[0]


def quantize(
    spec: ModelSpec,
    tensors: Mapping[str, torch.Tensor],
    recipe: Recipe,
    tokens: Sequence[int] = (),
    progress: Progress = lambda stage, done, total: None,
) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The spec and the tensors of a dense float32 model, packed as the recipe says, calibrated on `tokens`.

    `progress` gets (stage, layers done, layers). Raises ConfigError where a group does not divide, where there are
    fewer tokens than the recipe needs, and for a window longer than the model's context.
    """
    form: Any = registry.make("weights", recipe.choice(), device=True)
    head: Any = registry.make("weights", recipe.head, device=True)
    made = spec_in(spec, (recipe.format, 8.0), (recipe.head, None if recipe.head == "dense" else 8.0))
    packed = packed_names(made)
    _check_groups(made, form)
    ready: dict[str, torch.Tensor] = {}
    for index, weights, seen in changed(spec, tensors, recipe, tokens):
        progress("layers", index, len(spec.layers))
        for part_name, tensor in weights.items():
            name, matrix = f"layers.{index}.{part_name}", part_name.removesuffix(".weight")
            if matrix != part_name and name.removesuffix(".weight") in packed:
                held = seen.inputs.get(matrix)
                ready |= _packed(form, name.removesuffix(".weight"), tensor, None if held is None else held.gram)
            else:
                ready[name] = tensor.float().contiguous()
    progress("layers", len(spec.layers), len(spec.layers))
    for name in ("embed", "head"):
        if (weight := tensors.get(f"{name}.weight")) is None:
            continue
        if name in packed:
            ready |= _packed(head, name, weight)
        else:
            ready[f"{name}.weight"] = weight.float().contiguous()
    ready["final_norm.weight"] = tensors["final_norm.weight"].float()
    return _measured(made, ready), ready


def changed(
    spec: ModelSpec, tensors: Mapping[str, torch.Tensor], recipe: Recipe, tokens: Sequence[int] = ()
) -> Iterator[tuple[int, Weights, LayerSeen]]:
    """Layer after layer in floats, after the recipe's changes that leave its result alone, and what its matrices see.

    Weights go by their names in the layer. Nothing is changed, and nothing seen, by a recipe that needs no text.
    """
    if not recipe.needs_text:
        for index in range(len(spec.layers)):
            yield index, _layer(tensors, index), LayerSeen()
        return
    windows = _windows(spec, recipe, tokens)
    with torch.inference_mode():
        decoder = build(spec, tensors)
        step = contexts(decoder, recipe.length)
        streams = [decoder.embed(window) for window in windows]
    for index, layer in enumerate(spec.layers):
        weights = _layer(tensors, index)
        with torch.inference_mode():
            seen = observe(decoder.layers[index], streams, step)
            if recipe.smooth_attention:
                smooth_attention(layer, weights, seen)
            if recipe.smooth_outputs:
                smooth_outputs(layer, weights, seen, _error_of(recipe))
            if recipe.reorder and recipe.grouped:
                reorder(layer, weights, seen)
        yield index, weights, seen


def _layer(tensors: Mapping[str, torch.Tensor], index: int) -> Weights:
    stem = f"layers.{index}."
    return {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}


def _windows(spec: ModelSpec, recipe: Recipe, tokens: Sequence[int]) -> list[torch.Tensor]:
    if recipe.length > spec.context:
        raise ConfigError(f"length: got {recipe.length}, the model's context is {spec.context}")
    wanted = recipe.samples * recipe.length
    if len(tokens) < wanted:
        raise ConfigError(
            f"the calibration text has {len(tokens)} tokens, {recipe.samples} windows of {recipe.length} need {wanted}"
        )
    # Spread over the whole text: neighbours are alike.
    apart = (len(tokens) - recipe.length) // max(1, recipe.samples - 1) if recipe.samples > 1 else 0
    return [torch.tensor(tokens[i * apart : i * apart + recipe.length]) for i in range(recipe.samples)]


def _check_groups(made: ModelSpec, form: Any) -> None:
    if not hasattr(form, "groups"):
        return
    for name, linear in made.linears():
        if linear.format == form.name:
            try:
                form.groups(linear.in_width)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None


def _packed(form: Any, name: str, weight: torch.Tensor, gram: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        stream = form.pack(weight, calibration=gram)["stream"]
    return {f"{name}.stream": stream, f"{name}.shape": torch.tensor(weight.shape)}


def _error_of(recipe: Recipe) -> Callable[[str, torch.Tensor, torch.Tensor], float]:
    """How far a matrix's outputs are off once it and its inputs are rounded, ranges and roundings not chosen yet."""
    plain: Any = registry.make("weights", Recipe.plain(recipe.format, group=recipe.group).choice(), device=True)

    def error(name: str, weight: torch.Tensor, rows: torch.Tensor) -> float:
        return float((plain.linear(rows.contiguous(), plain.pack(weight)) - rows @ weight.T).square().sum())

    return error


def _measured(made: ModelSpec, ready: Mapping[str, torch.Tensor]) -> ModelSpec:
    """The spec with the bits a weight that each format really takes, on average."""
    said = packing_of(made, ready, {})
    matrices, head = said["matrices"], said["head"]
    return spec_in(made, (matrices["format"], matrices.get("bits")), (head["format"], head.get("bits")))
