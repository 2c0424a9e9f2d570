"""Dequantization against the reference decoder: the same bits, for every type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from millstream.core.errors import BadFile, Unsupported
from millstream.models import dequant
from millstream.models.dequant import dequantize
from millstream.models.gguf import BLOCKS, read_gguf

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def random_blocks(kind: str, num_blocks: int, seed: int) -> np.ndarray:
    """Blocks of any bytes, so all scales and all values are met, infinities and denormals among them."""
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, BLOCKS[kind][1]), dtype=np.uint8)


def reference(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def assert_same_bits(ours: torch.Tensor, expected: np.ndarray) -> None:
    found, expected = ours.numpy().reshape(-1), expected.reshape(-1)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~numbers)
    assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("num_blocks", [1, 3, 2048])
def test_random_blocks_give_the_reference_bits(kind: str, num_blocks: int) -> None:
    raw = random_blocks(kind, num_blocks, num_blocks)
    ours = dequantize(raw, kind, (num_blocks, BLOCKS[kind][0]))
    assert ours.dtype == torch.float32 and ours.shape == (num_blocks, BLOCKS[kind][0])
    assert_same_bits(ours, reference(raw, kind))


@pytest.mark.parametrize("kind", TYPES)
def test_chunks_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks(kind, 37, 5)
    expected = reference(raw, kind)
    for values in (1, 256, 700, 37 * 256):
        monkeypatch.setattr(dequant, "CHUNK_VALUES", values)
        assert_same_bits(dequantize(raw, kind, (37, BLOCKS[kind][0])), expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_float32_result_rounded_once(kind: str, dtype: torch.dtype) -> None:
    raw = random_blocks(kind, 65, 9)
    wide = dequantize(raw, kind, (65, BLOCKS[kind][0]))
    assert torch.equal(dequantize(raw, kind, wide.shape, dtype).nan_to_num(), wide.to(dtype).nan_to_num())


def test_what_was_quantized_comes_back_near() -> None:
    values = np.random.default_rng(3).standard_normal((8, 256), dtype=np.float32)
    for kind, error in (("Q4_0", 0.4), ("Q4_1", 0.3), ("Q5_0", 0.2), ("Q5_1", 0.15), ("Q8_0", 0.02), ("BF16", 0.02)):
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        ours = dequantize(raw.copy(), kind, values.shape).numpy()
        assert np.abs(ours - values).max() < error


def test_stored_floats_are_copied_not_shared() -> None:
    raw = np.zeros(32, dtype=np.uint8)
    ours = dequantize(raw, "F32", (8,))
    raw[:] = 255
    assert torch.equal(ours, torch.zeros(8))


def test_bytes_at_an_odd_address_are_read() -> None:
    values = np.arange(8, dtype=np.float32)
    buffer = np.zeros(33, dtype=np.uint8)
    buffer[1:] = values.view(np.uint8)
    assert torch.equal(dequantize(buffer[1:], "F32", (8,)), torch.from_numpy(values))


def test_a_type_that_cannot_be_read_is_named_with_those_that_can() -> None:
    with pytest.raises(Unsupported, match=r"blk\.0 is stored as IQ2_XXS; the types that can be read are F32.*Q6_K"):
        dequantize(bytearray(66), "IQ2_XXS", (256,), name="blk.0")


def test_bytes_that_do_not_fill_the_shape_are_refused() -> None:
    with pytest.raises(BadFile, match="35 bytes of Q8_0"):
        dequantize(bytearray(35), "Q8_0", (32,))
    with pytest.raises(BadFile, match="shape"):
        dequantize(bytearray(34), "Q8_0", (33,))


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "gemma3-270m", pytest.param("qwen2.5-coder-1.5b", marks=pytest.mark.large)]
)
def test_real_tensors_give_the_reference_bits(name: str, real_model: Callable[[str], Path]) -> None:
    file = read_gguf(real_model(name))
    seen: dict[str, int] = {}
    for tensor in file.tensors.values():
        if tensor.num_values > 20_000_000 or seen.get(tensor.type, 0) == 3:
            continue
        seen[tensor.type] = seen.get(tensor.type, 0) + 1
        raw = file.raw(tensor.name)
        ours = dequantize(raw, tensor.type, tensor.shape)
        width = tensor.shape[-1] // BLOCKS[tensor.type][0] * BLOCKS[tensor.type][1]
        assert_same_bits(ours, reference(np.frombuffer(raw, np.uint8).reshape(-1, width), tensor.type))
    assert len(seen) >= 2
