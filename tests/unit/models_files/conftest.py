"""Small model files that the tests write, and the real models where they are on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from millstream.core.errors import DownloadError
from millstream.models import store

# Taken before a test moves home: real models are looked for where the user keeps them.
_REAL_HOME = os.environ.get("MILLSTREAM_HOME")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for each test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MILLSTREAM_HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder


@pytest.fixture
def real_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The path of a named model that is already on this machine; skips the test where it is not."""

    def find(name: str) -> Path:
        with monkeypatch.context() as patch:
            if _REAL_HOME is None:
                patch.delenv("MILLSTREAM_HOME")
            else:
                patch.setenv("MILLSTREAM_HOME", _REAL_HOME)
            try:
                return store.resolve(name, download=False)
            except DownloadError:
                pytest.skip(f"{name} is not on this machine (millstream pull {name})")

    return find


def write_gguf(
    path: Path,
    arch: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, str]] | None = None,
    tokens: Sequence[str] = (),
) -> Path:
    """A file by the reference writer. A tensor is an array, or an array and the type to quantize it to."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys or {}).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    if tokens:
        writer.add_token_list(list(tokens))
    for name, given in (tensors or {}).items():
        if isinstance(given, tuple):
            kind = gguf.GGMLQuantizationType[given[1]]
            writer.add_tensor(name, gguf.quants.quantize(given[0], kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, given)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_keys(**more: Any) -> dict[str, Any]:
    return {
        "llama.block_count": 1,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.feed_forward_length": 96,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def llama_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One layer of width 64 (4 heads of 16, 2 key-value heads), under Hugging Face's names."""
    shapes = {
        "model.embed_tokens.weight": (32, 64),
        "model.norm.weight": (64,),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.gate_proj.weight": (96, 64),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as converters store them for arch llama: the two halves of each head taken in turns."""
    rows = weight.shape[0] // heads
    order = [h * rows + half * (rows // 2) + i for h in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def tiny_llama(path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray]]:
    """A one-layer llama as GGUF, and the weights that should come out of it."""
    weights = llama_weights(rng)
    layer = "model.layers.0."
    stored = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "blk.0.attn_norm.weight": weights[layer + "input_layernorm.weight"],
        "blk.0.ffn_norm.weight": weights[layer + "post_attention_layernorm.weight"],
        "blk.0.attn_q.weight": interleaved(weights[layer + "self_attn.q_proj.weight"], 4),
        "blk.0.attn_k.weight": interleaved(weights[layer + "self_attn.k_proj.weight"], 2),
        "blk.0.attn_v.weight": weights[layer + "self_attn.v_proj.weight"],
        "blk.0.attn_output.weight": weights[layer + "self_attn.o_proj.weight"],
        "blk.0.ffn_gate.weight": weights[layer + "mlp.gate_proj.weight"],
        "blk.0.ffn_up.weight": weights[layer + "mlp.up_proj.weight"],
        "blk.0.ffn_down.weight": weights[layer + "mlp.down_proj.weight"],
    }
    tokens = [f"t{i}" for i in range(32)]
    return write_gguf(path, "llama", llama_keys(), stored, tokens), weights
