"""`millstream build-kernels`: compile the native kernels now instead of at first use."""

from __future__ import annotations

import argparse
import time

from millstream.cli.output import emit, json_only, note, print_table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compiler", metavar="PROGRAM", help="the C++ compiler (default: the first of c++, g++, clang++)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.config.load import home
    from millstream.ops.cpu import build

    directory = home() / "kernels"
    built = []
    with json_only(args.json):
        for source in sorted(build.SOURCES.glob("*.cpp")):
            note(f"building {source.name}")
            start = time.perf_counter()
            path = build.build(source, directory, args.compiler)
            built.append({"kernel": source.stem, "path": str(path), "seconds": time.perf_counter() - start})
        if args.json:
            emit({"compiler": build.find_compiler(args.compiler), "kernels": built})
        else:
            rows = [(one["kernel"], f"{one['seconds']:.1f} s", one["path"]) for one in built]
            print_table(("kernel", "took", "is"), rows, right=(1,))
    return 0
