"""A model by name: its files, its spec and its tokenizer, opened without reading a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millstream.config.load import home
from millstream.core.errors import BadFile
from millstream.models import store
from millstream.models.encoder_spec import AnySpec, EncoderSpec
from millstream.models.families.protocol import Family, find_family
from millstream.models.packed import TOKENIZER, packed_spec
from millstream.models.sentence import as_told
from millstream.models.source import ModelSource, open_source
from millstream.text import built, from_folder, from_gguf
from millstream.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Opened:
    """`spec` is named by the id that the model was asked for."""

    source: ModelSource
    spec: AnySpec

    def tokenizer(self) -> Tokenizer:
        """Raises BadFile and Unsupported."""
        if self.source.metadata:
            kept = home() / "tokenizers"
            return from_gguf.load_tokenizer(self.source.metadata, kept, self.source.checksum(), path=self.source.path)
        if (self.source.path / TOKENIZER).is_file():
            return built.load(self.source.path / TOKENIZER)
        return from_folder.load_folder_tokenizer(self.source.path, home() / "tokenizers")


def open_model(name: str, progress: Any = None, notice: Any = None) -> Opened:
    """Finds (or downloads) a model and reads its headers. Raises UnknownModel, DownloadError, BadFile, Unsupported."""
    path: Path = store.resolve(name, progress=progress, notice=notice)
    source = open_source(path, name)
    return Opened(source, model_spec(source))


def model_spec(source: ModelSource, family: Family | None = None) -> AnySpec:
    """The spec of a source, with the formats that it is packed in, named by its id; errors name its file."""
    try:
        spec = (family or find_family(source.config)).spec(source.config)
    except BadFile as error:
        raise BadFile(source.path, error.what) from error
    if isinstance(spec, EncoderSpec):
        spec = as_told(spec, source.path)
    elif source.packing:
        spec = packed_spec(spec, source)
    return replace(spec, name=source.id)
