"""A mixture of experts against the sum written out token by token."""

from __future__ import annotations

import pytest
import torch

from millstream.ops.ref.mlp import moe, moe_route


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"softmax_first": False}])
def test_the_mixture_is_the_weighted_sum_of_the_chosen_experts(options):
    generator = torch.Generator().manual_seed(3)
    x, logits = torch.randn(7, 12, generator=generator), torch.randn(7, 5, generator=generator)
    experts = torch.randn(5, 12, 12, generator=generator)
    out = moe(x, logits, lambda e, rows: rows @ experts[e], 2, **options)
    weights, chosen = moe_route(logits, 2, **options)
    for t in range(7):
        expected = sum(
            w.double() * (x[t].double() @ experts[e].double()) for w, e in zip(weights[t], chosen[t], strict=True)
        )
        torch.testing.assert_close(out[t].double(), expected, atol=2e-5, rtol=0)


def test_experts_that_nobody_chose_are_not_run():
    ran = []
    logits = torch.tensor([[5.0, 0.0, 4.0, 0.0], [0.0, 1.0, 9.0, 0.0]])

    def expert(e, rows):
        ran.append((e, rows.shape[0]))
        return rows

    moe(torch.ones(2, 3), logits, expert, 2)
    assert ran == [(0, 1), (1, 1), (2, 2)]
