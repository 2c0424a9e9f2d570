"""Writes a packed model as a folder that loads like any other (`models/packed.py` has the form)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from millstream.core.errors import ConfigError
from millstream.models.opened import Opened
from millstream.models.packed import TOKENIZER, packing_of, write_safetensors
from millstream.models.quantize.recipe import Recipe
from millstream.models.safetensors_file import SINGLE
from millstream.models.spec import ModelSpec
from millstream.text import built, from_gguf

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)


def check_target(folder: Path) -> None:
    """Raises ConfigError where the folder cannot be made: before an hour goes into what to put there."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a folder that does not, nothing is overwritten")
    above = folder.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ConfigError(f"{folder} cannot be made: {above} is not a folder")


def save(opened: Opened, spec: ModelSpec, tensors: Mapping[str, torch.Tensor], recipe: Recipe, folder: Path) -> int:
    """Writes what `quantize` made of a model; the folder appears whole or not at all. Returns its bytes.

    Raises ConfigError where it exists already, OSError where it cannot be written.
    """
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        source = opened.source
        config = {**source.config, "quantization_config": packing_of(spec, tensors, recipe.said())}
        _write_json(temporary / "config.json", config)
        if source.generation_config:
            _write_json(temporary / "generation_config.json", source.generation_config)
        if source.metadata:
            built.save(temporary / TOKENIZER, *from_gguf.built_tokenizer(source.metadata, source.path))
        for name in (*_COPIED, TOKENIZER):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, temporary / name)
        write_safetensors(temporary / SINGLE, tensors)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return size


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
