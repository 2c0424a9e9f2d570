"""The native product of 8-bit activations, one scale a row, with matrices that have one scale an output."""

from __future__ import annotations

import threading

import torch

from millstream.ops.cpu import program
from millstream.ops.ref.channel import fits, groups_of, linear_channel
from millstream.ops.table import Ask, Refusal

_mine = threading.local()


def _accepts(ask: Ask) -> Refusal | None:
    if ask.device != "cpu":
        return Refusal(f"tensors on {ask.device}")
    if ask.dtype != torch.float32:
        return Refusal(f"activations of {ask.dtype}")
    return program.refusal()


@linear_channel.implement("cpu", accepts=_accepts)
def linear_channel_cpu(
    x: torch.Tensor, stream: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `ops.ref.channel.linear_channel`."""
    rows, inputs = x.shape
    if not fits(stream, outputs, inputs, bits) or not stream.is_contiguous():
        raise ValueError(f"a stream of {tuple(stream.shape)} for {outputs} x {inputs} at {bits} bits")
    if bias is not None:
        if bias.shape != (outputs,):
            raise ValueError(f"a bias of {tuple(bias.shape)} for {outputs} outputs")
        bias = bias.float().contiguous()
    if x.dtype != torch.float32 or x.stride(1) != 1:
        x = x.float().contiguous()
    y = torch.empty((rows, outputs), dtype=torch.float32)
    if not hasattr(_mine, "scratch"):
        _mine.scratch = program.Scratch()
    groups = groups_of(stream, inputs, bits) or 0
    matrix = program.matrix(stream, outputs, inputs, bits, bias, program.CHANNEL, groups)
    args = program.Product(matrix, x.data_ptr(), y.data_ptr())
    args.rows, args.x_stride, args.y_stride = rows, x.stride(0), outputs
    args.num_threads = torch.get_num_threads()
    _mine.scratch.call("product", args)
    return y
