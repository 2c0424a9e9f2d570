"""`millstream pull`: download a model, with progress; what an interrupted download had is kept and continued."""

from __future__ import annotations

import argparse

from millstream.cli.output import download_progress, emit, json_only, note


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a short name (millstream list), or org/name[:file.gguf] on the hub")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.models import store

    with json_only(args.json):
        with download_progress(args.name) as progress:
            path = store.pull(args.name, progress, note)
        size = sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())
        if args.json:
            emit({"name": args.name, "path": str(path), "bytes": size})
        else:
            print(path)
    return 0
