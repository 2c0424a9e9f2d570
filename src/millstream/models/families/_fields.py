"""Reads a Hugging Face style model configuration so that no field goes unnoticed.

A family asks for each field that it understands, with the values that may stand there. What was neither asked for
nor is known to have no say in a forward pass is an error when `finish` is called: a model that is loaded is a model
that is understood.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from millstream.core.errors import BadFile, Unsupported, nearest
from millstream.models.spec import (
    Activation,
    GenerationDefaults,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

# Fields that say how a model was made, stored, trained or generated from, not what it computes.
# fmt: off
IGNORED = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map",
    "name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "use_cache", "initializer_range", "attention_dropout", "id2label", "label2id", "problem_type", "num_labels",
    "classifier_dropout", "finetuning_task", "task_specific_params", "output_attentions", "output_hidden_states",
    "output_scores", "return_dict", "return_dict_in_generate", "output_router_logits", "router_aux_loss_coef",
    "chunk_size_feed_forward", "pretraining_tp", "tokenizer_class", "prefix", "sep_token_id",
    "decoder_start_token_id", "torchscript", "use_bfloat16", "pruned_heads", "tf_legacy_loss",
    "keys_to_ignore_at_inference", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "cache_implementation", "is_llama_config",
    "transformers.js_config",
})
# fmt: on

# Fields whose one value keeps the model what we take it for.
FIXED: Mapping[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "router_jitter_noise": (0, None),
}

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
}

SCALINGS = ("default", "linear", "llama3", "yarn")

_NO_DEFAULT = object()


class Fields:
    """The configuration of one model, read field by field."""

    def __init__(self, family: str, config: Mapping[str, Any]) -> None:
        self.family = family
        self._config = config
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._config.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _NO_DEFAULT, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int = 1) -> int | None:
        self._asked.add(name)
        return self.integer(name, low=low) if self.has(name) else None

    def number(self, name: str, default: Any = _NO_DEFAULT, above: float = 0.0) -> float:
        return self._number(name, self._get(name, default), above)

    def optional_number(self, name: str) -> float | None:
        self._asked.add(name)
        return self.number(name) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def activation(self, name: str, default: str) -> Activation:
        value = self._get(name, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(name, value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def only(self, name: str, *allowed: object) -> None:
        """Refuses any value but these; a missing field counts as None, which is always allowed."""
        self._asked.add(name)
        value = self._config.get(name)
        if value is not None and value not in allowed:
            shown = " or ".join(repr(a) for a in allowed if a is not None) or "null"
            raise self.unsupported(name, value, shown)

    def ignore(self, *names: str) -> None:
        self._asked.update(names)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.raw(name, ())
        if not isinstance(value, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise self.wrong(name, value, "a list of integers")
        return tuple(value)

    def layer_windows(self, num_layers: int, window: int | None, default: Sequence[bool]) -> tuple[int | None, ...]:
        """The window of each layer, None where it looks at everything.

        `layer_types` decides where it is given, `default` (whether layer i slides) where it is not.
        """
        kinds = self.raw("layer_types")
        if kinds is None:
            slides = list(default)
        else:
            if isinstance(kinds, str) or not isinstance(kinds, Sequence) or len(kinds) != num_layers:
                raise self.wrong("layer_types", kinds, f"a list with one entry for each of {num_layers} layers")
            for kind in kinds:
                if kind not in ("full_attention", "sliding_attention"):
                    raise self.unsupported("layer_types", kind, "'full_attention' or 'sliding_attention'")
            slides = [kind == "sliding_attention" for kind in kinds]
        if any(slides) and window is None:
            raise self.wrong("sliding_window", None, "an integer of 1 or more where layers of sliding attention exist")
        return tuple(window if slide else None for slide in slides)

    def rope(self, head_dim: int, context: int, default_theta: float = 10_000.0) -> RopeSpec:
        """Rotary positions in either spelling: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
        found = self.raw("rope_parameters")
        scaling = self.raw("rope_scaling")
        theta = self.raw("rope_theta", default_theta)
        original = self.optional_integer("original_max_position_embeddings")
        if found is None:
            found = scaling or {}
        name = "rope_parameters" if self.has("rope_parameters") else "rope_scaling"
        return self.rope_of(name, found, head_dim, context, theta, original)

    def rope_of(
        self, name: str, found: Any, head_dim: int, context: int, default_theta: Any, original: int | None = None
    ) -> RopeSpec:
        """One rotary embedding from the mapping `found`, which stands in field `name`."""
        if not isinstance(found, Mapping):
            raise self.wrong(name, found, "a mapping")
        inner = _Inside(self, name, found)
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in SCALINGS:
            raise self.unsupported(f"{name}.rope_type", kind, f"one of {', '.join(SCALINGS)}")
        inner.known("rope_type", "type", "rope_theta", "partial_rotary_factor")
        theta = inner.optional("rope_theta") or self._number("rope_theta", default_theta, 0.0)
        if found.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.unsupported(f"{name}.partial_rotary_factor", found["partial_rotary_factor"], "1")
        if head_dim % 2:
            raise self.wrong("head_dim", head_dim, "an even number: rotary positions pair its two halves")
        scaling: RopeScaling | None = None
        if kind == "linear":
            scaling = LinearScaling(inner.number("factor"))
        elif kind == "llama3":
            low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
            if not low < high:
                raise self.wrong(f"{name}.high_freq_factor", high, f"a number above low_freq_factor, {low:g}")
            scaling = Llama3Scaling(inner.number("factor"), low, high, original or inner.context(context))
        elif kind == "yarn":
            scaling = self._yarn(inner, original or inner.context(context), context)
        inner.finish()
        return RopeSpec(theta, head_dim, scaling)

    def _yarn(self, inner: _Inside, original: int, context: int) -> YarnScaling:
        factor = inner.optional("factor") or context / original
        attention = inner.optional("attention_factor")
        mscale, mscale_all = inner.optional("mscale"), inner.optional("mscale_all_dim")
        if attention is None:
            if mscale and mscale_all:
                attention = _yarn_attention(factor, mscale) / _yarn_attention(factor, mscale_all)
            else:
                attention = _yarn_attention(factor, 1.0)
        return YarnScaling(
            factor,
            original,
            inner.optional("beta_fast") or 32.0,
            inner.optional("beta_slow") or 1.0,
            attention,
            inner.flag("truncate", True),
        )

    def generation(self, vocab_size: int) -> GenerationDefaults:
        """Token ids that the configuration names. Ids out of the vocabulary mean that there is none."""

        def one(name: str) -> int | None:
            value = self.raw(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise self.wrong(name, value, "a token id")
            return value if value is not None and 0 <= value < vocab_size else None

        stops = self.raw("eos_token_id", ())
        stops = tuple(stops) if isinstance(stops, Sequence) and not isinstance(stops, str) else (stops,)
        for stop in stops:
            if not isinstance(stop, int) or isinstance(stop, bool) or stop >= vocab_size:
                raise self.wrong("eos_token_id", stop, f"token ids from 0 to {vocab_size - 1}")
        return GenerationDefaults(one("bos_token_id"), tuple(s for s in stops if s >= 0), one("pad_token_id"))

    def finish(self) -> None:
        """Raises Unsupported for the first field that nobody asked for."""
        for name, allowed in FIXED.items():
            if name not in self._asked:
                self.only(name, *allowed)
        for name, value in self._config.items():
            if name not in self._asked and name not in IGNORED:
                close = nearest(name, self._asked | IGNORED)
                raise Unsupported(
                    f"model config field {name!r} = {value!r:.80} is not known to the family {self.family!r}"
                    + (f"; the nearest known field is {close!r}" if close else "")
                )

    def wrong(self, name: str, got: object, allowed: str) -> BadFile:
        """The error for a value that cannot be."""
        return BadFile("model config", f"{name}: got {got!r:.80}, allowed is {allowed}")

    def unsupported(self, name: str, got: object, allowed: str) -> Unsupported:
        """The error for a value that may be right but asks for something that is not built here."""
        return Unsupported(
            f"model config of family {self.family!r}: {name} = {got!r:.80} is not supported, only {allowed}"
        )

    def _get(self, name: str, default: Any) -> Any:
        self._asked.add(name)
        value = self._config.get(name)
        if value is None:
            if default is _NO_DEFAULT:
                raise BadFile("model config", f"the field {name!r} is missing (family {self.family!r} needs it)")
            return default
        return value

    def _number(self, name: str, value: Any, above: float) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= above:
            raise self.wrong(name, value, f"a number above {above:g}")
        return float(value)


class _Inside:
    """A mapping inside a field, read with the same care."""

    def __init__(self, fields: Fields, name: str, found: Mapping[str, Any]) -> None:
        self._fields, self._name, self._found = fields, name, found
        self._asked: set[str] = set()

    def known(self, *names: str) -> None:
        self._asked.update(names)

    def optional(self, name: str) -> float | None:
        self.known(name)
        value = self._found.get(name)
        return None if value is None else self._fields._number(f"{self._name}.{name}", value, 0.0)

    def number(self, name: str) -> float:
        value = self.optional(name)
        if value is None:
            raise BadFile("model config", f"the field {self._name}.{name} is missing")
        return value

    def context(self, default: int) -> int:
        value = self.optional("original_max_position_embeddings")
        return default if value is None else int(value)

    def flag(self, name: str, default: bool) -> bool:
        self.known(name)
        value = self._found.get(name, default)
        if not isinstance(value, bool):
            raise self._fields.wrong(f"{self._name}.{name}", value, "true or false")
        return value

    def finish(self) -> None:
        # A top-level original_max_position_embeddings wins over this one, which is then only known.
        self.known("original_max_position_embeddings")
        for name, value in self._found.items():
            if name not in self._asked and value is not None:
                close = nearest(name, self._asked)
                raise Unsupported(
                    f"model config field {self._name}.{name} = {value!r:.80} is not known to the family "
                    f"{self._fields.family!r}" + (f"; the nearest known field is {close!r}" if close else "")
                )


def _yarn_attention(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
