"""`millstream list`: the models that are known by a short name, and those that were pulled from a hub."""

from __future__ import annotations

import argparse

from millstream.cli.output import emit, json_only, print_table, size_in_words

WHERE = {"home": "pulled", "package": "in an installed package", "hub": "pulled from a hub", "": "not here"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--here", action="store_true", help="only those that are on this machine")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.models import store

    found = [model for model in store.list_models() if model.here or not args.here]
    with json_only(args.json):
        if args.json:
            emit(
                {
                    "models": [
                        {
                            "name": model.name,
                            "summary": model.summary,
                            "bytes": model.size_bytes,
                            "here": model.here,
                            "origin": model.origin,
                            "path": None if model.path is None else str(model.path),
                        }
                        for model in found
                    ]
                }
            )
            return 0
        rows = [
            (model.name, model.summary, size_in_words(model.size_bytes), WHERE.get(model.origin, model.origin))
            for model in found
        ]
        print_table(("name", "model", "size", "where"), rows, right=(2,))
    return 0
