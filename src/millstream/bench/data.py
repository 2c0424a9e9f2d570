"""Public data sets for benchmarks: found in $MILLSTREAM_DATA, else in the cache, else downloaded from where they come.

Only what an experiment here reads is listed. A downloaded file is kept in the form that the data folder has.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from millstream.config.load import data_dir, home
from millstream.core.errors import BadFile, DownloadError, UnknownName

_TIMEOUT_S = 60
_MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class DataSet:
    """One file: where it lies in a data folder, the public file it is made from, and how."""

    path: str
    repository: str
    commit: str
    source: str
    licence: str
    convert: Callable[[bytes], bytes] = lambda data: data

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.source}"


def _every_second_row(data: bytes) -> bytes:
    header, *rows = data.decode().splitlines(keepends=True)
    return (header + "".join(rows[::2])).encode()


SETS = {
    "sharegpt-lengths": DataSet(
        "traces_lengths/sharegpt_8k.csv.gz",
        "project-etalon/etalon",
        "d5f18de15a22",
        "data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
        "Apache-2.0",
        _every_second_row,
    ),
    "wikitext2-test": DataSet(
        "lm_perplexity/wikitext2_test.txt.gz",
        "pytorch/examples",
        "77f55b912142",
        "word_language_model/data/wikitext-2/test.txt",
        "CC BY-SA 3.0",
    ),
    "wikitext2-train": DataSet(
        "lm_train/wikitext2_train_5k.txt.gz",
        "NagusameCS/HyperTensor",
        "fe7264328a06",
        "data/wikitext2_train_5k.txt",
        "CC BY-SA 3.0",
    ),
}


def find(name: str, download: bool = True) -> Path:
    """The file of a data set. Raises UnknownName, and DownloadError when it is neither here nor to be had."""
    if name not in SETS:
        raise UnknownName("data set", name, SETS)
    entry = SETS[name]
    folder = data_dir()
    for root in (folder, home() / "data"):
        if root is not None and (root / entry.path).is_file():
            return root / entry.path
    if not download:
        raise DownloadError(f"data set {name} is not here; set MILLSTREAM_DATA to a folder with {entry.path}")
    try:
        with urllib.request.urlopen(entry.url, timeout=_TIMEOUT_S) as answer:
            data = answer.read(_MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DownloadError(
            f"data set {name} could not be downloaded from {entry.url}: {error}. "
            f"Put it at {home() / 'data' / entry.path}, or set MILLSTREAM_DATA to a folder that has it"
        ) from error
    if len(data) > _MAX_BYTES:
        raise DownloadError(f"data set {name} is over {_MAX_BYTES} bytes")
    path = home() / "data" / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(gzip.compress(entry.convert(data), mtime=0))
    part.replace(path)
    return path


def text(name: str) -> str:
    """A text data set, decompressed. Raises BadFile when it is damaged."""
    path = find(name)
    try:
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadFile(path, f"is damaged: {error}") from error


def lengths(name: str) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each row of a lengths data set. Raises BadFile naming the line."""
    rows = csv.DictReader(io.StringIO(text(name)))
    out = []
    for line, row in enumerate(rows, start=2):
        try:
            out.append((int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(find(name), f"line {line}: {error}") from error
    return out
