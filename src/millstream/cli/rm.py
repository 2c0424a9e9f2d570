"""`millstream rm`: remove a model that was pulled, with its converted weights."""

from __future__ import annotations

import argparse
import sys

from millstream.cli.output import emit, json_only, size_in_words


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a short name, or org/name[:file.gguf]; a path is yours to remove")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.core.errors import ConfigError
    from millstream.models import store

    with json_only(args.json):
        if not args.yes:
            if not sys.stdin.isatty():
                raise ConfigError("rm asks before it removes, and nobody is there to answer: add --yes")
            print(f"Remove {args.name} and its converted weights? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                if args.json:
                    emit({"name": args.name, "removed": False, "freed_bytes": 0})
                return 1
        freed = store.remove(args.name)
        if args.json:
            emit({"name": args.name, "removed": True, "freed_bytes": freed})
        else:
            kept = "; it is also in an installed package, which stays" if _in_package(args.name) else ""
            print(f"freed {size_in_words(freed)}{kept}")
    return 0


def _in_package(name: str) -> bool:
    from millstream.models import store

    return any(model.name == name and model.origin == "package" for model in store.list_models())
