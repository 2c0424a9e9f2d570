"""A model that Millstream reads, written as a Hugging Face folder: config.json, safetensors, tokenizer.

    PYTHONPATH=benchmarks python -m peers.export_hf MODEL FOLDER [--dtype bfloat16]

Engines that read no GGUF file get the same model so: weights are dequantized by Millstream's own loader and rounded to
`dtype`. The tokenizer is the one built from the file, with its control tokens as added tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from millstream.core.errors import BadFile, UnknownName
from millstream.models.opened import open_model
from millstream.models.source import ModelSource
from millstream.text.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bytes of a shard: as much as is held in memory at once.
SHARD = 1 << 30
INDEX = "model.safetensors.index.json"


def export(name: str, folder: str | Path, dtype: str = "bfloat16", shard_bytes: int = SHARD) -> Path:
    """Writes `folder` whole or not at all; one that is there already is left as it is.

    Raises UnknownName for a dtype, and what opening the model raises.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    opened = open_model(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        write_weights(opened.source, made, DTYPES[dtype], shard_bytes)
        write_tokenizer(opened.tokenizer(), made)
        config = {**opened.source.config, "torch_dtype": dtype}
        (made / "generation_config.json").write_text(json.dumps(opened.source.generation_config))
        (made / "config.json").write_text(json.dumps(config, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    return folder


def write_weights(source: ModelSource, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD) -> None:
    """Tensors by their usual names, in one file or in shards with an index. A tied head is not written again."""
    shards = list(_shards(source, dtype, shard_bytes))
    where: dict[str, str] = {}
    total = 0
    for place, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{place:05}-of-{len(shards):05}.safetensors"
        tensors = {name: source.tensor(name, dtype).clone() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _shards(source: ModelSource, dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    tied = bool(source.config.get("tie_word_embeddings"))
    names: list[str] = []
    size = 0
    for name in source.tensor_names():
        if tied and name == "lm_head.weight":
            continue
        nbytes = torch.Size(source.shape(name)).numel() * dtype.itemsize
        if names and size + nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json. Raises BadFile for a tokenizer whose control tokens clash."""
    facts = tokenizer.facts
    spec: dict[str, Any] = json.loads(tokenizer._backend.to_str())
    added = {token["id"]: token for token in spec["added_tokens"]}
    for text, special in facts.specials.items():
        if special.id in added and added[special.id]["content"] != text:
            raise BadFile(folder, f"two tokens have the id {special.id}")
        added[special.id] = {
            "id": special.id,
            "content": text,
            "single_word": False,
            "lstrip": special.lstrip,
            "rstrip": special.rstrip,
            "normalized": False,
            "special": True,
        }
        # The library gives an added token the id that its vocabulary has for it, and a new one otherwise.
        spec["model"]["vocab"].setdefault(text, special.id)
    spec["added_tokens"] = [added[token_id] for token_id in sorted(added)]
    if spec["decoder"] is None:
        spec["decoder"] = _decoder(facts.spelling, facts.strip_prefix)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    spelled = {special.id: text for text, special in facts.specials.items()}
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": facts.add_bos}
    for role in ("bos", "eos", "pad", "unk"):
        token_id = getattr(facts, f"{role}_id")
        if token_id is not None and token_id in spelled:
            told[f"{role}_token"] = spelled[token_id]
    if "default" in facts.chat_templates:
        told["chat_template"] = facts.chat_templates["default"]
    (folder / "tokenizer_config.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def _decoder(spelling: str, strip_prefix: bool) -> dict[str, Any]:
    if spelling == "byte-level":
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    args = parser.parse_args()
    print(export(args.model, args.folder, args.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
