"""What a GGUF file says, in Hugging Face's words: its numbers as a config, its tensors under their usual names.

Two things are stored differently and are put back where the tensors are read (`Piece`):

- arch `llama` keeps the rows of Q and K interleaved for pairwise RoPE; `heads` says by how many heads to undo it;
- arch `gemma3` keeps its norm weights plus one; `shift` says what to add.

Only numbers and names here, no torch. Sources: the GGUF specification and the published configs of each family.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millstream.core.errors import BadFile, Unsupported, nearest
from millstream.models.gguf import FILE_TYPES, GgufFile, GgufTensor, Strings

ARCHS = ("llama", "qwen2", "qwen3", "gemma3", "qwen2moe", "qwen3moe")

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QWEN_MOE_LAYER = {
    **_LAYER,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_LAYER = {**_LAYER, "ffn_gate_inp": "block_sparse_moe.gate"}
_QWEN_EXPERT = {part: f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
_MIXTRAL_EXPERT = {
    "gate": "block_sparse_moe.experts.{}.w1",
    "down": "block_sparse_moe.experts.{}.w2",
    "up": "block_sparse_moe.experts.{}.w3",
}
# Tensors that carry no weight of their own: RoPE tables, which the config states.
_IGNORED = re.compile(
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight"
)
_IN_LAYER = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)(?:\.(\d{1,6}))?\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor by its usual name as a part of a stored one.

    `expert` picks one of the stacked experts, `heads` un-interleaves the rows of that many heads, `shift` is added.
    """

    stored: GgufTensor
    shape: tuple[int, ...]
    expert: int | None = None
    heads: int = 0
    shift: float = 0.0


class GgufModel:
    """The config and the tensors of a GGUF file in Hugging Face terms. Raises BadFile and Unsupported when made."""

    __slots__ = ("arch", "config", "file", "generation_config", "pieces")

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.arch = self._text("general.architecture")
        if self.arch not in ARCHS:
            close = nearest(self.arch, ARCHS)
            raise Unsupported(
                f"{file.path} is of the architecture {self.arch!r}"
                + (f"; the nearest known is {close!r}" if close else "")
                + f"; known are {', '.join(ARCHS)}"
            )
        if file.metadata.get("split.count", 0) not in (0, 1):
            raise Unsupported(
                f"{file.path} is one part of a split model; merge the parts first (llama-gguf-split --merge)"
            )
        self.config = self._config()
        self.pieces = self._pieces()
        self.generation_config = self._generation_config()

    # Reading keys

    def _bad(self, what: str) -> BadFile:
        return BadFile(self.file.path, what)

    def _text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if not isinstance(value, str):
            raise self._bad(f"key {key!r} is missing" if value is None else f"key {key!r} is not text")
        return value

    def _get(self, name: str, default: Any = None) -> Any:
        """The value of `<arch>.<name>`, a number that is the same in all layers where the file gives one a layer."""
        key = f"{self.arch}.{name}"
        value = self.file.metadata.get(key, default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if not value or any(v != value[0] for v in value):
                raise Unsupported(
                    f"{self.file.path}: key {key!r} differs from layer to layer, which no known family has"
                )
            return value[0]
        return value

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if value is None:
            raise self._bad(f"key '{self.arch}.{name}' is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise self._bad(f"key '{self.arch}.{name}' is {value!r:.80}, allowed is a positive whole number")
        return value

    def _real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if value is None:
            raise self._bad(f"key '{self.arch}.{name}' is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._bad(f"key '{self.arch}.{name}' is {value!r:.80}, allowed is a positive number")
        return shortest(value)

    def _tensor(self, name: str) -> GgufTensor:
        found = self.file.tensors.get(name)
        if found is None:
            raise self._bad(f"tensor {name!r} is missing")
        return found

    # Numbers

    def _config(self) -> dict[str, Any]:
        embedding = self._tensor("token_embd.weight")
        hidden, layers = self._count("embedding_length"), self._count("block_count")
        if len(embedding.shape) != 2 or embedding.shape[1] != hidden:
            raise self._bad(
                f"tensor 'token_embd.weight' has shape {list(embedding.shape)}, its rows should have {hidden}"
            )
        if layers > len(self.file.tensors):
            raise self._bad(
                f"key '{self.arch}.block_count' is {layers}, but there are {len(self.file.tensors)} tensors"
            )
        heads = self._count("attention.head_count")
        kv_heads = self._count("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise self._bad(f"{heads} attention heads do not divide by {kv_heads} key-value heads")
        head_dim = self._count("attention.key_length", hidden // heads)
        if self._count("attention.value_length", head_dim) != head_dim:
            raise Unsupported(f"{self.file.path}: keys and values of different length")
        if self._count("rope.dimension_count", head_dim) != head_dim:
            raise Unsupported(f"{self.file.path}: RoPE over a part of each head")
        config: dict[str, Any] = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": self._real("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._count("context_length"),
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "hidden_act": "silu",
        }
        self._special_tokens(config)
        getattr(self, f"_{self.arch}")(config)
        return config

    def _special_tokens(self, config: dict[str, Any]) -> None:
        rows = config["vocab_size"]
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if tokens is not None and not isinstance(tokens, Strings):
            raise self._bad("key 'tokenizer.ggml.tokens' is not a list of strings")
        if tokens is not None and len(tokens) > rows:
            raise self._bad(f"{len(tokens)} tokens, but 'token_embd.weight' has {rows} rows")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            token_id = self.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token_id is None:
                continue
            if not isinstance(token_id, int) or not 0 <= token_id < rows:
                raise self._bad(f"key 'tokenizer.ggml.{key}_token_id' is {token_id!r:.40}, there are {rows} tokens")
            config[f"{name}_token_id"] = token_id

    def _llama(self, config: dict[str, Any]) -> None:
        experts = self._get("expert_count", 0)
        config["intermediate_size"] = self._count("feed_forward_length")
        self._rope(config, 10000.0)
        window = self._get("attention.sliding_window")
        if experts:
            config |= {
                "model_type": "mixtral",
                "architectures": ["MixtralForCausalLM"],
                "num_local_experts": self._count("expert_count"),
                "num_experts_per_tok": self._count("expert_used_count"),
                "sliding_window": self._count("attention.sliding_window") if window else None,
            }
        elif window:
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
            config["sliding_window"] = self._count("attention.sliding_window")
        else:
            config |= {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": "blk.0.attn_q.bias" in self.file.tensors,
                "mlp_bias": "blk.0.ffn_gate.bias" in self.file.tensors,
            }

    def _qwen2(self, config: dict[str, Any]) -> None:
        config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        config["intermediate_size"] = self._count("feed_forward_length")
        self._plain_head_dim(config)
        config["use_sliding_window"] = False
        self._rope(config, 10000.0)

    def _qwen3(self, config: dict[str, Any]) -> None:
        config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
        config["intermediate_size"] = self._count("feed_forward_length")
        config["attention_bias"] = "blk.0.attn_q.bias" in self.file.tensors
        self._rope(config, 10000.0)

    def _gemma3(self, config: dict[str, Any]) -> None:
        del config["hidden_act"]
        heads, layers, head_dim = config["num_attention_heads"], config["num_hidden_layers"], config["head_dim"]
        config |= {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "intermediate_size": self._count("feed_forward_length"),
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "sliding_window": self._count("attention.sliding_window"),
            "rope_local_base_freq": self._real("rope.freq_base_swa", 10000.0),
            # The 27B model alone (62 layers) scales by width over heads; the file does not say so.
            "query_pre_attn_scalar": config["hidden_size"] // heads if layers == 62 else head_dim,
            "attn_logit_softcapping": self._soft_cap("attn_logit_softcapping"),
            "final_logit_softcapping": self._soft_cap("final_logit_softcapping"),
        }
        # Every sixth layer sees everything; files written before the key was introduced leave it out.
        pattern = self._get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
            raise self._bad(
                f"key 'gemma3.attention.sliding_window_pattern' is {pattern!r:.80}, allowed is a count of layers"
            )
        config["layer_types"] = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        self._rope(config, 1000000.0)

    def _soft_cap(self, name: str) -> float | None:
        return self._real(name) if self._get(name) else None

    def _qwen2moe(self, config: dict[str, Any]) -> None:
        config |= {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "use_sliding_window": False}
        self._plain_head_dim(config)
        config["shared_expert_intermediate_size"] = self._count("expert_shared_feed_forward_length")
        self._experts(config, normalised=False)

    def _qwen3moe(self, config: dict[str, Any]) -> None:
        config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": False}
        config["attention_bias"] = "blk.0.attn_q.bias" in self.file.tensors
        self._experts(config, normalised=True)

    def _experts(self, config: dict[str, Any], normalised: bool) -> None:
        experts, used = self._count("expert_count"), self._count("expert_used_count")
        if used > experts:
            raise self._bad(f"key '{self.arch}.expert_used_count' is {used}, but there are {experts} experts")
        width = self._count("expert_feed_forward_length", self._tensor("blk.0.ffn_down_exps.weight").shape[-1])
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": used,
            "moe_intermediate_size": width,
            "intermediate_size": self._count("feed_forward_length", width)
            if self._get("feed_forward_length")
            else width,
            "norm_topk_prob": bool(self._get("expert_weights_norm", normalised)),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        self._rope(config, 10000.0)

    def _plain_head_dim(self, config: dict[str, Any]) -> None:
        if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
            del config["head_dim"]

    def _rope(self, config: dict[str, Any], theta: float) -> None:
        config["rope_theta"] = self._real("rope.freq_base", theta)
        config["rope_scaling"] = None
        linear = self._real("rope.scale_linear") if self._get("rope.scale_linear") else 1.0
        kind = self._get("rope.scaling.type", "linear")
        factor = self._real("rope.scaling.factor") if self._get("rope.scaling.factor") else linear
        if "rope_freqs.weight" in self.file.tensors:
            config["rope_scaling"] = self._rope_factors(config)
        elif kind == "linear" and factor != 1.0:
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        elif kind == "yarn":
            original = self._count("rope.scaling.original_context_length", config["max_position_embeddings"])
            scaling = {"rope_type": "yarn", "factor": self._real("rope.scaling.factor")}
            scaling["original_max_position_embeddings"] = original
            for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
                if self._get(f"rope.scaling.{key}") is not None:
                    scaling[name] = self._real(f"rope.scaling.{key}")
            config["rope_scaling"] = scaling
        elif kind not in ("none", "linear"):
            raise Unsupported(
                f"{self.file.path}: RoPE scaling of the type {kind!r:.40}; known are none, linear, yarn and llama3"
            )

    def _rope_factors(self, config: dict[str, Any]) -> dict[str, Any]:
        """The scaling whose table `rope_freqs.weight` is: llama3's where it fits, else the same table by itself."""
        tensor = self._tensor("rope_freqs.weight")
        half = config["head_dim"] // 2
        if tensor.type != "F32" or tensor.num_values != half:
            raise self._bad(f"tensor 'rope_freqs.weight' should be {half} numbers of F32")
        stored = list(struct.unpack(f"<{half}f", self.file.raw("rope_freqs.weight")))
        if not all(math.isfinite(f) and f > 0 for f in stored):
            raise self._bad("tensor 'rope_freqs.weight' holds a factor that is not a positive number")
        factor, theta = shortest(max(stored)), config["rope_theta"]
        for original in (8192, 4096, 2048):
            told = llama3_factors(theta, half, factor, 1.0, 4.0, original)
            if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(told, stored, strict=True)):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
        return {
            "rope_type": "longrope",
            "short_factor": stored,
            "long_factor": stored,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config["max_position_embeddings"],
        }

    def _generation_config(self) -> dict[str, Any]:
        """What a generation_config.json would say: who ends a text, and the sampling the file recommends."""
        metadata, rows = self.file.metadata, self.config["vocab_size"]
        found: dict[str, Any] = {k: self.config[k] for k in ("bos_token_id", "pad_token_id") if k in self.config}
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        unique = list(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < rows))
        if unique:
            found["eos_token_id"] = unique[0] if len(unique) == 1 else unique
        for name, key in _SAMPLING.items():
            value = metadata.get(f"general.sampling.{name}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[key] = shortest(value) if isinstance(value, float) else value
        return found

    # Names

    def _pieces(self) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        for stored in self.file.tensors.values():
            for name, piece in self._named(stored):
                if name in pieces:
                    raise self._bad(f"tensors {pieces[name].stored.name!r} and {stored.name!r} are both {name!r}")
                pieces[name] = piece
        return pieces

    def _named(self, stored: GgufTensor) -> list[tuple[str, Piece]]:
        if stored.name in _TOP:
            return [(_TOP[stored.name], self._piece(stored, stored.name))]
        if _IGNORED.fullmatch(stored.name):
            return []
        match = _IN_LAYER.fullmatch(stored.name)
        if match is None or int(match[1]) >= self.config["num_hidden_layers"]:
            raise self._unknown(stored.name)
        layer, part, expert, suffix = f"model.layers.{int(match[1])}", match[2], match[3], match[4]
        experts = {"mixtral": _MIXTRAL_EXPERT, "qwen2_moe": _QWEN_EXPERT, "qwen3_moe": _QWEN_EXPERT}.get(
            self.config["model_type"]
        )
        if experts and part.startswith("ffn_") and (part.endswith("_exps") or expert is not None):
            which = experts.get(part.removeprefix("ffn_").removesuffix("_exps"))
            if which is None or suffix != "weight":
                raise self._unknown(stored.name)
            if expert is not None:
                return [(f"{layer}.{which.format(int(expert))}.weight", Piece(stored, stored.shape))]
            count = self.config.get("num_experts") or self.config["num_local_experts"]
            if len(stored.shape) != 3 or stored.shape[0] != count:
                raise self._bad(
                    f"tensor {stored.name!r} has shape {list(stored.shape)}, it should stack {count} experts"
                )
            return [
                (f"{layer}.{which.format(i)}.weight", Piece(stored, stored.shape[1:], expert=i)) for i in range(count)
            ]
        name = self._layer_names().get(part)
        if name is None or expert is not None:
            raise self._unknown(stored.name)
        return [(f"{layer}.{name}.{suffix}", self._piece(stored, part))]

    def _layer_names(self) -> Mapping[str, str]:
        if self.arch == "gemma3":
            return _GEMMA_LAYER
        if self.arch in ("qwen2moe", "qwen3moe"):
            return _QWEN_MOE_LAYER
        return _MIXTRAL_LAYER if self.config["model_type"] == "mixtral" else _LAYER

    def _piece(self, stored: GgufTensor, part: str) -> Piece:
        shape = stored.shape
        if part == "ffn_gate_inp_shexp" and len(shape) == 1:
            shape = (1, *shape)
        heads, shift = 0, 0.0
        if self.arch == "llama" and part in ("attn_q", "attn_k"):
            heads = self.config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            if shape[0] % (2 * heads):
                raise self._bad(f"tensor {stored.name!r} has {shape[0]} rows, which do not divide into {heads} heads")
        if self.arch == "gemma3" and part.removesuffix(".weight").endswith("norm"):
            shift = -1.0
            if stored.type != "F32":
                raise Unsupported(f"{self.file.path}: tensor {stored.name!r} is stored as {stored.type}, norms are F32")
        return Piece(stored, shape, heads=heads, shift=shift)

    def _unknown(self, name: str) -> Unsupported:
        return Unsupported(
            f"{self.file.path}: tensor {name!r} is not one that the architecture {self.arch!r} is known to have"
        )

    # Summary

    def quantization(self) -> str:
        """What people call the file ("Q4_K_M"), or the type that holds most of its values."""
        kind = self.file.metadata.get("general.file_type")
        if isinstance(kind, int) and kind in FILE_TYPES:
            return FILE_TYPES[kind]
        held: Counter[str] = Counter()
        for t in self.file.tensors.values():
            held[t.type] += t.num_values
        return held.most_common(1)[0][0]


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def llama3_factors(theta: float, half: int, factor: float, low: float, high: float, original: int) -> list[float]:
    """By what llama3's RoPE scaling divides each of the `half` frequencies."""
    divisors = []
    for i in range(half):
        wavelength = 2 * math.pi * theta ** (i / half)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def shortest(value: float) -> float:
    """The shortest decimal that is the same number in float32: 1e-05 for 9.999999747378752e-06."""
    value = float(value)
    try:
        single = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == single:
            return short
    return value
