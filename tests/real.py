"""Where the tests find real models and public texts. Nowhere else is this decided.

A model is the file of its short name in the folder that MILLSTREAM_TEST_MODELS names, else what the model store has
(pulled, or inside an installed package). Nothing is downloaded. Texts are under the folder that MILLSTREAM_DATA names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millstream.core.errors import DownloadError
from millstream.models import store

NAMES = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b", "all-minilm-l6-v2")

# Taken before any test moves home: models are where the user keeps them.
_HOME = os.environ.get("MILLSTREAM_HOME")


def find(name: str) -> Path | None:
    """The file of a real model, or None where this machine has it not."""
    assert name in NAMES
    folder = os.environ.get("MILLSTREAM_TEST_MODELS")
    if folder and (path := Path(folder) / f"{name}.gguf").is_file():
        return path
    with pytest.MonkeyPatch.context() as patch:
        if _HOME is None:
            patch.delenv("MILLSTREAM_HOME", raising=False)
        else:
            patch.setenv("MILLSTREAM_HOME", _HOME)
        try:
            return store.resolve(name, download=False)
        except DownloadError:
            return None


def model_path(name: str) -> Path:
    """The file of a real model; skips the test where this machine has it not."""
    path = find(name)
    if path is None:
        pytest.skip(f"{name} is not on this machine (millstream pull {name}, or MILLSTREAM_TEST_MODELS=FOLDER)")
    return path


def data_folder() -> Path | None:
    """The folder of public texts, or None."""
    folder = os.environ.get("MILLSTREAM_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None


def data_file(*parts: str) -> Path:
    """A file of public texts; skips the test where it is not there."""
    folder = data_folder()
    if folder is None:
        pytest.skip("MILLSTREAM_DATA names no folder of public texts")
    path = folder.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"{'/'.join(parts)} is not in the folder that MILLSTREAM_DATA names")
    return path
