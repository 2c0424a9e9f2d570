"""Encoders of a few thousand random numbers, in folders as sentence-transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from millstream.models.families.bert import KINDS, LAYER, OUTER, Bert

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "of", "in", "cat", "dog", "house", "paris", "berlin", "france", "capital", "is", "runs", "red", "blue"]
PIECES = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789.,!?[]<>|'", *WORDS]
PIECES += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["##ing"]

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": len(PIECES),
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 96,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def tokenizer() -> Tokenizer:
    """WordPiece over a handful of words and all letters, framed as BERT frames."""
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(SPECIAL)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    return backend


def tensors(config: dict[str, Any], seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random weights by the checkpoint's names, wide enough that an error shows, with what BERT has besides."""
    spec = Bert().spec(config)
    generator = torch.Generator().manual_seed(seed)
    theirs = {ours: name for name, ours in OUTER.items()}
    layer = {ours: name for name, ours in LAYER.items()}
    made = {}
    for wanted in spec.tensors():
        for part, rows in wanted.parts:
            stem, _, kind = part.rpartition(".")
            words = stem.split(".")
            name = theirs.get(stem) or f"encoder.layer.{words[1]}.{layer['.'.join(words[2:])]}"
            values = torch.randn((rows, *wanted.shape[1:]), generator=generator)
            if "norm" in stem:
                values = values * 0.2 + (1.0 if kind == "weight" else 0.0)
            elif kind == "bias":
                values *= 0.1
            else:
                values *= 0.5 if stem in ("embed", "positions", "types") else 0.15
            own = "" if stem == "classifier" else prefix
            made[f"{own}{name}.{kind}"] = values
    if not spec.labels:
        for kind in ("weight", "bias"):
            made[f"{prefix}pooler.dense.{kind}"] = torch.zeros((48, 48) if kind == "weight" else (48,))
    return made


def old_names(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the first releases named the parts of a norm."""
    back = {new: old for old, new in KINDS.items() if old != new}
    return {
        f"{name.rpartition('.')[0]}.{back[name.rpartition('.')[2]]}" if "LayerNorm" in name else name: tensor
        for name, tensor in made.items()
    }


def write(
    folder: Path,
    *,
    pooling: str | None = "mean_tokens",
    normalize: bool = True,
    max_seq_length: int | None = None,
    labels: int = 0,
    seed: int = 0,
    **options: Any,
) -> Path:
    """The folder of an encoder; with `labels` that of a cross-encoder. `pooling` None: nothing is said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **options}
    if labels:
        config |= {
            "architectures": ["BertForSequenceClassification"],
            "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
        }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config, seed, "bert." if labels else ""), folder / "model.safetensors", {"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    named = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", **{f"{k}_token": v for k, v in named.items()}})
    )
    if pooling is not None and not labels:
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
        (folder / "modules.json").write_text(
            json.dumps(
                [
                    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                    for i, (path, kind) in enumerate(modules)
                ]
            )
        )
        (folder / "1_Pooling").mkdir(exist_ok=True)
        flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 48, **{f"pooling_mode_{flag}": flag == pooling for flag in flags}})
        )
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": max_seq_length, "do_lower_case": False})
        )
    return folder
