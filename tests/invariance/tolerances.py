"""How close is equal, for each set of kernels. The only place: no test of this folder has a number of its own.

`oracle_atol` bounds logprobs against the naive generator, whose attention sums in another order (None: they are not
held to it); tokens must be equal wherever the generator's two best are more than `near_tie` apart. `alone_atol` bounds
logprobs against the same engine running the request cold and alone: 0 where kernels promise the same bits for every
batch and chunking.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """A set of kernels, what it runs with and what it promises. `block_size` is one that its attention takes."""

    name: str
    ops: str
    attention: str
    block_size: int
    weights: str = "dense"
    kv: str = "plain"
    oracle_atol: float | None = 5e-5
    alone_atol: float = 5e-5
    near_tie: float = 1e-4


KERNELS = (
    Kernels("torch", ops="ref", attention="torch-ref", block_size=8),
    # Attention and the products are bit-invariant; norms and activations are still torch's.
    Kernels("native", ops="auto", attention="auto", block_size=16),
    # Rounded activations jump where the naive generator's last digits differ, so it is no judge of these: what they
    # round is held to account by their own tests. What is promised here is every bit, whoever shares the batch.
    Kernels("blocks", "auto", "auto", 16, weights="blocks", kv="int8", oracle_atol=None, alone_atol=0.0),
    Kernels("kv4", "auto", "auto", 16, weights="blocks", kv="int4", oracle_atol=None, alone_atol=0.0),
)
