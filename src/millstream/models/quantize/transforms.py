"""Changes to a layer's weights that leave its result alone, and make it or its KV cache easier to round.

All work on `weights`, the layer's tensors by their names in the layer, in place, and keep what was seen true of them.

Shapes: C width, H query heads, K kv heads, D head dimension, N inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from millstream.models.quantize.observe import LayerSeen
from millstream.models.spec import AttentionSpec, LayerSpec, MlpSpec

Weights = dict[str, torch.Tensor]
# How much of an outlier of the keys goes to the queries.
ALPHA = 0.5
# (share of the inputs' size, share of the weights' size) that are tried for outputs: almost all goes to the weights.
SHARES = ((0.0, 0.0), (0.1, 0.9), (0.2, 0.8), (0.3, 0.7), (0.5, 0.5))


def smooth_attention(spec: LayerSpec, weights: Weights, seen: LayerSeen) -> None:
    """K / lambda and Q * lambda, lambda = (largest of a pair of channels that a rotation turns)^0.5 (section 4.2).

    Where queries and keys are normed it goes into the weights of these norms, one lambda for all heads: scaling W_k
    would be undone by the norm.
    """
    mixer = spec.mixer
    if seen.keys is None:
        return
    keys = seen.keys.amax(0, keepdim=True) if mixer.qk_norm is not None else seen.keys
    by = _paired(keys, mixer.rope.dim if mixer.rope is not None else 0).pow(ALPHA)
    by = torch.where(by > 1e-4, by, 1.0)
    if mixer.qk_norm is not None:
        offset = mixer.qk_norm.offset
        weights["attn.q_norm.weight"] = (weights["attn.q_norm.weight"] + offset) * by[0] - offset
        weights["attn.k_norm.weight"] = (weights["attn.k_norm.weight"] + offset) / by[0] - offset
    else:
        ratio = mixer.heads // mixer.kv_heads
        _scale_rows(weights, "attn.qkv", 0, by.repeat_interleave(ratio, 0).flatten())
        _scale_rows(weights, "attn.qkv", mixer.heads * mixer.head_dim, 1 / by.flatten())
    seen.keys = seen.keys / by


def _paired(keys: torch.Tensor, turned: int) -> torch.Tensor:
    """keys (K, D) with both of each pair of turned channels the larger of the two."""
    half = turned // 2
    out = keys.clone()
    out[:, :half] = out[:, half:turned] = torch.maximum(keys[:, :half], keys[:, half:turned])
    return out


def smooth_outputs(
    spec: LayerSpec, weights: Weights, seen: LayerSeen, error: Callable[[str, torch.Tensor, torch.Tensor], float]
) -> None:
    """Inputs of the last matrices of attention and MLP divided by s, their columns times s, s = |x|^a / |w|^b.

    1/s goes into the rows of W_v (query heads of one kv head share theirs) and of the MLP's up. Of the shares tried the
    one with the smallest `error(matrix's name, weight, rows of inputs)` is taken; among them is to change nothing.
    """
    mixer = spec.mixer
    values = (mixer.heads + mixer.kv_heads) * mixer.head_dim
    _smooth(weights, seen, "attn.out", error, mixer, lambda by: _scale_rows(weights, "attn.qkv", values, 1 / by))
    if isinstance(spec.channel, MlpSpec):
        inner = spec.channel.inner
        _smooth(weights, seen, "mlp.down", error, None, lambda by: _scale_rows(weights, "mlp.gate_up", inner, 1 / by))


def _smooth(
    weights: Weights,
    seen: LayerSeen,
    name: str,
    error: Callable[[str, torch.Tensor, torch.Tensor], float],
    mixer: AttentionSpec | None,
    fold: Callable[[torch.Tensor], None],
) -> None:
    weight, held = weights[f"{name}.weight"], seen.inputs[name]
    x, w = held.most, weight.abs().amax(0)
    if mixer is not None:
        shape = (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)
        x, w = x.view(shape).amax(1), w.view(shape).amax(1)

    def whole(by: torch.Tensor) -> torch.Tensor:
        return by.flatten() if mixer is None else by[:, None].expand(shape).flatten()

    best, chosen = torch.inf, None
    for a, b in SHARES:
        by = _even(x.pow(a) / w.clamp(min=1e-8).pow(b)) if a or b else torch.ones_like(x)
        found = error(name, weight * whole(by), held.rows / whole(by))
        if found < best:
            best, chosen = found, by
    if chosen is None:
        return
    weights[f"{name}.weight"] = weight * whole(chosen)
    seen.inputs[name] = held.scaled(whole(chosen))
    fold(chosen.flatten())


def _even(by: torch.Tensor) -> torch.Tensor:
    """Scaled to a mean (of logarithms) of one, and held to what keeps floats exact enough."""
    by = torch.where(by > 0, by, 1.0)
    return (by / by.log().mean().exp()).clamp(1e-3, 1e3)


def reorder(spec: LayerSpec, weights: Weights, seen: LayerSeen) -> None:
    """The MLP's inner channels by the size of what they carry, so that a group has weights of one importance.

    As in QoQ's own settings the residual stream and the heads stay in their order.
    """
    if not isinstance(spec.channel, MlpSpec):
        return
    inner = spec.channel.inner
    order = torch.argsort(seen.inputs["mlp.down"].most, descending=True, stable=True)
    rows = torch.cat((order, order + inner))
    for part in ("weight", "bias"):
        if f"mlp.gate_up.{part}" in weights:
            weights[f"mlp.gate_up.{part}"] = weights[f"mlp.gate_up.{part}"][rows]
    weights["mlp.down.weight"] = weights["mlp.down.weight"][:, order].contiguous()
    seen.inputs["mlp.down"] = seen.inputs["mlp.down"].ordered(order)


def _scale_rows(weights: Weights, name: str, first: int, by: torch.Tensor) -> None:
    rows = slice(first, first + by.shape[0])
    for part in ("weight", "bias"):
        if f"{name}.{part}" in weights:
            changed = weights[f"{name}.{part}"].clone()
            changed[rows] *= by[:, None] if part == "weight" else by
            weights[f"{name}.{part}"] = changed
