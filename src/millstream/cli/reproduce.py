"""`millstream reproduce`: run a paper's experiment, technique against baseline, correctness first."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    from millstream.reproduce.commands import reproduce_arguments

    reproduce_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from millstream.reproduce.commands import reproduce_command

    return reproduce_command(args.name, quick=args.quick, record=args.record, json=args.json, out=args.out)
