"""`millstream show`: what there is to know of a model without loading it."""

from __future__ import annotations

import argparse
from typing import Any

from millstream.cli.output import emit, json_only, print_table, size_in_words

LABELS = {
    "summary": "model",
    "model_type": "architecture",
    "parameters": "parameters",
    "quantization": "quantization",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "context",
    "chat_template": "chat template",
    "stored_bytes": "weights on disk",
    "size_bytes": "file",
    "sha256": "sha256",
    "license": "license",
    "packages": "packages",
    "path": "path",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a short name (millstream list), org/name[:file.gguf] on the hub, or a path")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.models import store

    facts = store.show(args.name)
    if facts.get("path") is not None and "sha256" not in facts:
        from millstream.models.source import open_source

        facts["sha256"] = open_source(facts["path"]).checksum()
    with json_only(args.json):
        if args.json:
            emit(facts)
            return 0
        rows = [(label, _spell(key, facts[key])) for key, label in LABELS.items() if facts.get(key) is not None]
        print_table((facts["name"], ""), rows)
        if facts.get("path") is None:
            print(f"\nnot on this machine; get it with: millstream pull {args.name}")
    return 0


def _spell(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("bytes"):
        return f"{size_in_words(value)} ({value:,} bytes)"
    if isinstance(value, list):
        return ", ".join(value) if len(value) < 5 else f"{value[0]} ... {value[-1]} ({len(value)})"
    return f"{value:,}" if isinstance(value, int) else str(value)
