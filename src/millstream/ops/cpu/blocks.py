"""The native product of 8-bit activations with matrices of 4- and 8-bit codes."""

from __future__ import annotations

import threading

import torch

from millstream.ops.cpu import program
from millstream.ops.ref.blocks import linear_blocks, stream_shape
from millstream.ops.table import Ask, Refusal

_mine = threading.local()


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    if ask.dtype != torch.float32:
        return Refusal(f"activations of {ask.dtype}")
    return program.refusal()


@linear_blocks.implement("cpu", accepts=_accepts)
def linear_blocks_cpu(
    x: torch.Tensor, stream: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `ops.ref.blocks.linear_blocks`."""
    rows, inputs = x.shape
    if tuple(stream.shape) != stream_shape(outputs, inputs, bits) or not stream.is_contiguous():
        raise ValueError(f"a stream of {tuple(stream.shape)} for {outputs} x {inputs} at {bits} bits")
    if x.dtype != torch.float32 or x.stride(1) != 1:
        x = x.float().contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    y = torch.empty((rows, outputs), dtype=torch.float32)
    if not hasattr(_mine, "scratch"):
        _mine.scratch = program.Scratch()
    args = program.Product(program.matrix(stream, outputs, inputs, bits, bias), x.data_ptr(), y.data_ptr())
    args.rows, args.x_stride, args.y_stride = rows, x.stride(0), outputs
    args.num_threads = torch.get_num_threads()
    _mine.scratch.call("product", args)
    return y
