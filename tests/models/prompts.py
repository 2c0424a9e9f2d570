"""Real prompts of any length, by seed: from the public texts where they are, else from what Python brings along."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import real


def texts() -> list[str]:
    """Essays, talk, code, encyclopedia and many languages, long ones and short ones."""
    folder = real.data_folder()
    found = [] if folder is None else _public(folder)
    return found or _own()


def draw(encode, count: int, longest: int, seed: int) -> list[list[int]]:
    """`count` prompts of 1 to `longest` tokens (both ends among them, evenly spread over the magnitudes).

    `encode` makes token ids of a text. Each prompt starts anywhere in a text, at the start of a word.
    """
    rng = random.Random(seed)
    sources = texts()
    prompts = []
    for place in range(count):
        length = round(longest ** (place / (count - 1))) if count > 1 else longest
        while True:
            text = rng.choice(sources)
            start = rng.randrange(max(1, len(text) - 6 * length))
            start = text.find(" ", start) + 1
            ids = encode(text[start : start + 12 * length + 40])[:length]
            if len(ids) == length:
                prompts.append(ids)
                break
    return prompts


def _public(folder: Path) -> list[str]:
    def lines(*parts: str) -> list[dict]:
        path = folder.joinpath(*parts)
        if not path.is_file():
            return []
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            return [json.loads(line) for line in file]

    found = [row["text"] for row in lines("lm_long_context", "paul_graham_essays.jsonl.gz")]
    found.append("\n\n".join(_spoken(row["prompt"]) for row in lines("chat_oasst", "en_100_tree.jsonl.gz")))
    found.append(
        "\n".join(row["prompt"] + row["canonical_solution"] for row in lines("lm_humaneval", "HumanEval.jsonl"))
    )
    found += ["\n".join(row["paragraphs"]) for row in lines("lm_multilingual", "udhr.jsonl.gz")]
    path = folder / "lm_perplexity" / "wikitext2_test.txt.gz"
    if path.is_file():
        found.append(gzip.decompress(path.read_bytes()).decode())
    return [text for text in found if text]


def _spoken(message: dict) -> str:
    return "\n".join([message["text"], *(_spoken(reply) for reply in message["replies"][:1])])


def _own() -> list[str]:
    """The interpreter's licence, and the sources and doc strings of some of its modules."""
    import argparse
    import builtins
    import inspect
    import statistics
    import textwrap

    said = [inspect.getdoc(getattr(builtins, name)) or "" for name in sorted(vars(builtins))]
    said += [inspect.getsource(module) for module in (argparse, textwrap, statistics, random)]
    licence = Path(sys.base_prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "LICENSE.txt"
    if licence.is_file():
        said.append(licence.read_text())
    return [text for text in said if len(text) > 400] + ["\n".join(said[: len(vars(builtins))])]
