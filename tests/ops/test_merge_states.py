"""Split the keys anywhere, attend to the parts, merge: equal to attending to the whole."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.ops.ref.attention import merge_states


def attend(q, k, v):
    scores = q @ k.T
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


@settings(max_examples=80, deadline=None)
@given(
    num_keys=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    spread=st.sampled_from((0.1, 1.0, 30.0)),
    seed=st.integers(0, 2**31),
)
def test_merging_any_split_of_the_keys_equals_attention_over_all(num_keys, cuts, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 8, generator=generator) * spread
    k, v = torch.randn(num_keys, 8, generator=generator), torch.randn(num_keys, 8, generator=generator)
    edges = [0, *sorted(min(cut, num_keys) for cut in cuts), num_keys]
    parts = []
    for low, high in itertools.pairwise(edges):
        if low == high:
            parts.append((torch.zeros(3, 8), torch.full((3,), -torch.inf)))
        else:
            parts.append(attend(q, k[low:high], v[low:high]))
    out, lse = merge_states(parts)
    whole, whole_lse = attend(q.double(), k.double(), v.double())
    # Rounding of the scores themselves: they are sums of products some `spread` large.
    bound = 2e-6 * max(1.0, float((q.double() @ k.double().T).abs().max()))
    torch.testing.assert_close(out.double(), whole, atol=bound * 4, rtol=0)
    torch.testing.assert_close(lse.double(), whole_lse, atol=bound, rtol=0)
