from __future__ import annotations

import torch

from millstream.ops.cases import Case, Table, call, normal
from millstream.ops.ref.norm import layer_norm, rms_norm

BF16 = torch.bfloat16


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> tuple[torch.Tensor, ...]:
    wide = x.double()
    root = ((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return (wide / root * (weight.double() + offset),)


def exact_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    wide = x.double()
    variance = (wide * wide).mean(-1, keepdim=True) - wide.mean(-1, keepdim=True) ** 2
    return ((wide - wide.mean(-1, keepdim=True)) / (variance + eps) ** 0.5 * weight.double() + bias.double(),)


TABLES = (
    Table(
        rms_norm,
        (
            Case("one token", call(normal(1, 576), normal(576), 1e-5), 1e-6, 1e-6),
            Case("no token", call(normal(0, 576), normal(576), 1e-5), 0.0),
            Case("width 1", call(normal(3, 1), normal(1), 1e-6), 1e-6, 1e-6),
            Case("gemma", call(normal(7, 640), normal(640), 1e-6, 1.0), 1e-6, 1e-6),
            Case("heads", call(normal(5, 4, 256), normal(256), 1e-6, 1.0), 1e-6, 1e-6),
            Case("zeros", call(normal(2, 64, scale=0.0), normal(64), 1e-5), 1e-6),
            Case("tiny values", call(normal(4, 576, scale=1e-6), normal(576), 1e-5), 1e-9, 1e-6),
            Case("large values", call(normal(4, 576, scale=1e6), normal(576), 1e-5), 1e-6, 1e-6),
            Case("big", call(normal(512, 1536), normal(1536), 1e-6), 1e-6, 1e-6),
            Case("bfloat16", call(normal(9, 576, dtype=BF16), normal(576, dtype=BF16), 1e-5), 1e-6, 4e-3),
        ),
        exact,
    ),
    Table(
        layer_norm,
        (
            Case("one token", call(normal(1, 384), normal(384), normal(384), 1e-12), 2e-6, 1e-6),
            Case("no token", call(normal(0, 384), normal(384), normal(384), 1e-12), 0.0),
            Case("odd width", call(normal(5, 37), normal(37), normal(37), 1e-5), 2e-6, 1e-6),
            Case("zeros", call(normal(2, 64, scale=0.0), normal(64), normal(64), 1e-5), 1e-6),
            Case("big", call(normal(512, 1024), normal(1024), normal(1024), 1e-12), 2e-6, 1e-6),
            Case(
                "bfloat16",
                call(normal(9, 384, dtype=BF16), normal(384, dtype=BF16), normal(384, dtype=BF16), 1e-5),
                2e-2,
                1e-2,
            ),
        ),
        exact_layer,
    ),
)
