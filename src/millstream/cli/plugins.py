"""`millstream plugins`: every plug-in by extension point, with its options. Read from source; nothing is imported."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path
from typing import Any

from millstream.cli.output import emit, json_only, print_table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("point", nargs="?", help="only this extension point")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.core import registry
    from millstream.core.errors import UnknownName
    from millstream.reproduce.papers import plugin_cards

    points = [point for point in registry.points() if point != "experiment"]
    if args.point is not None and args.point not in points:
        raise UnknownName("extension point", args.point, points)
    rows: list[dict[str, Any]] = [
        {
            "point": placed.point,
            "name": placed.card.name,
            "summary": placed.card.summary,
            "paper": placed.card.paper,
            "lossless": placed.card.lossless,
            "error": placed.card.error,
            "switch": placed.switch,
            "options": options(placed.point, placed.card.name),
        }
        for placed in plugin_cards()
        if args.point in (None, placed.point)
    ]
    with json_only(args.json):
        if args.json:
            emit({"plugins": rows})
            return 0
        print_table(
            ("point", "name", "paper", "lossless", "options", "what it does"),
            [
                (
                    row["point"],
                    row["name"],
                    row["paper"] or "",
                    "yes" if row["lossless"] else f"no: {row['error']}",
                    ", ".join(f"{one['name']}={one['default']}" for one in row["options"]),
                    row["summary"],
                )
                for row in rows
            ],
            right=(2,),
        )
    return 0


def options(point: str, name: str) -> list[dict[str, str]]:
    """The fields of a plug-in's Config: name, type and default as they are spelled in its source."""
    source = _source(point, name)
    if source is None:
        return []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return [
                {
                    "name": line.target.id,
                    "type": ast.unparse(line.annotation),
                    "default": "required" if line.value is None else ast.unparse(line.value),
                }
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            ]
    return []


def _source(point: str, name: str) -> Path | None:
    """The file that holds a plug-in's Card and Config; finding it imports the folder's own package only."""
    from millstream.core import registry

    try:
        found = importlib.util.find_spec(f"{registry.POINTS[point]}.{name.replace('-', '_')}")
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin else None
