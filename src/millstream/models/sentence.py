"""What a folder of sentence-transformers says beside the model: how rows become one vector, and how long a text may be.

modules.json                  Transformer, Pooling, Normalize, in order
1_Pooling/config.json         which pooling
sentence_bert_config.json     max_seq_length
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millstream.core.errors import BadFile, Unsupported
from millstream.models.encoder_spec import EncoderSpec, Pooling, PoolingKind
from millstream.models.safetensors_file import read_json, read_json_list

# The names of our kinds in the two spellings of 1_Pooling/config.json.
_FLAGS: Mapping[str, PoolingKind] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean-sqrt-len",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, PoolingKind] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean-sqrt-len",
    "lasttoken": "last",
}


def as_told(spec: EncoderSpec, folder: Path) -> EncoderSpec:
    """The spec with what the folder says of it; without a word, the mean of the rows with length 1.

    Raises BadFile for files that are damaged, Unsupported for a pooling or a module that is not known.
    """
    if not folder.is_dir():
        return spec
    length = folder / "sentence_bert_config.json"
    if length.is_file() and not spec.labels:
        most = read_json(length).get("max_seq_length")
        if most is not None:
            if type(most) is not int or not most >= 2:
                raise BadFile(length, f"max_seq_length: got {most!r:.40}, allowed is an integer from 2")
            spec = replace(spec, usual_context=min(most, spec.context))
    modules = folder / "modules.json"
    if not modules.is_file() or spec.labels:
        return spec
    kind: PoolingKind | None = None
    normalize = False
    for module in read_json_list(modules):
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            kind = _pooling(_inside(folder, modules, module) / "config.json")
        elif name == "Normalize":
            normalize = True
        elif name != "Transformer":
            raise Unsupported(
                f"{modules}: the module {name!r} is not known; there are: Transformer, Pooling, Normalize"
            )
    if kind is None:
        raise BadFile(modules, "there is no module Pooling")
    return replace(spec, pooling=Pooling(kind, normalize))


def _inside(folder: Path, modules: Path, module: Mapping[str, Any]) -> Path:
    path = module.get("path")
    if not isinstance(path, str) or Path(path).name != path:
        raise BadFile(modules, f"the path {path!r:.80} of a module is no folder beside it")
    return folder / path


def _pooling(file: Path) -> PoolingKind:
    if not file.is_file():
        raise BadFile(file, "is missing")
    told = read_json(file)
    named = told.get("pooling_mode")
    if named is not None:
        modes = named if isinstance(named, list) else [named]
        found = [_NAMES.get(str(mode)) for mode in modes]
    else:
        asked = [key for key, value in told.items() if key.startswith("pooling_mode_") and value is True]
        found = [_FLAGS.get(key) for key in asked]
    kinds = [kind for kind in found if kind is not None]
    if len(found) != 1 or len(kinds) != 1:
        raise Unsupported(f"{file}: the pooling is not one of {', '.join(_NAMES)}")
    return kinds[0]
