"""`millstream plan`: how many engines of which kind a recorded load needs, and what they cost."""

from __future__ import annotations

import argparse
from typing import Any

from millstream.cli import output
from millstream.cli import sim as sim_command

MOST = 256


def arguments(parser: argparse.ArgumentParser) -> None:
    sim_command.arguments(parser)
    parser.add_argument(
        "--kind",
        action="append",
        metavar="PROFILE[=PRICE]",
        help="a kind of engine and what an hour of it costs; may be repeated, --list names all",
    )
    parser.add_argument("--share", type=float, default=0.99, metavar="X", help="of requests within it (default 0.99)")
    parser.add_argument("--most", type=int, default=64, metavar="N", help="replicas that are tried (default 64)")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return sim_command.run(args)
    from dataclasses import replace

    from millstream.core.errors import BadRequest
    from millstream.sim import report
    from millstream.sim.scenario import Prepared

    slo = report.parse_slo(args.slo)
    if not slo:
        raise BadRequest("slo", "none", "ttft:SECONDS or another limit, which the plan is to keep")
    if not 0 < args.share <= 1:
        raise BadRequest("share", args.share, "a number above 0, at most 1")
    if not 1 <= args.most <= MOST:
        raise BadRequest("most", args.most, f"an integer from 1 to {MOST}")
    scenario = sim_command.scenario_of(args)
    kinds = args.kind or list(scenario.profiles)
    rows: list[dict[str, Any]] = []
    with output.json_only(args.json):
        for kind in kinds:
            name, price = _kind(kind)
            prepared = Prepared(replace(scenario, profiles=(name,), replicas=(1,)))
            profile = prepared.kinds[0][0]
            cost = profile.price if price is None else price
            calls = prepared.calls()

            def holds(count: int, prepared: Any = prepared, calls: Any = calls, name: str = name) -> float:
                with output.progress_bar(len(calls), f"{count} x {name}") as step:
                    return report.attainment(prepared.run(calls=calls, counts=(count,), progress=step), slo)

            count, reached = smallest(holds, args.share, args.most)
            rows.append(
                {
                    "kind": name,
                    "replicas": count,
                    "attainment": reached,
                    "price": cost,
                    "cost": None if count is None else count * cost,
                }
            )
    rows.sort(key=lambda row: (row["cost"] is None, row["cost"]))
    if args.json:
        output.emit({"slo": slo, "share": args.share, "kinds": rows})
        return 0
    titles = ("kind", "replicas", "within SLO", "an hour")
    output.print_table(
        titles,
        [
            (
                row["kind"],
                f"more than {args.most}" if row["replicas"] is None else row["replicas"],
                f"{100 * row['attainment']:.1f} %",
                "-" if row["cost"] is None else f"{row['cost']:.2f}",
            )
            for row in rows
        ],
        right=(1, 2, 3),
    )
    return 0


def smallest(holds: Any, share: float, most: int) -> tuple[int | None, float]:
    """The fewest replicas whose share of requests within the limits is large enough, and that share. None: too many.

    `holds` gives the share for a number of replicas. More are taken to be no worse.
    """
    low, high = 0, 1
    reached = holds(high)
    while reached < share:
        if high >= most:
            return None, reached
        low, high = high, min(2 * high, most)
        reached = holds(high)
    while high - low > 1:
        middle = (low + high) // 2
        share_there = holds(middle)
        if share_there >= share:
            high, reached = middle, share_there
        else:
            low = middle
    return high, reached


def _kind(given: str) -> tuple[str, float | None]:
    from millstream.core.errors import ConfigError

    name, equals, price = given.rpartition("=")
    if not equals:
        return given, None
    try:
        return name, float(price)
    except ValueError:
        raise ConfigError(f"--kind {given}: PROFILE=PRICE, a number") from None
