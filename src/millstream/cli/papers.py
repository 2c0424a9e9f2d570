"""`millstream papers`: the techniques, where each lives, the switch that turns it on, and whether it works."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    from millstream.reproduce.commands import papers_arguments

    papers_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from millstream.reproduce.commands import papers_command

    return papers_command(json=args.json)
