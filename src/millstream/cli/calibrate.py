"""`millstream calibrate`: how long this machine's steps take, kept as a profile for `millstream sim`."""

from __future__ import annotations

import argparse
import datetime
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from millstream.cli import output
from millstream.cli.options import MODEL_HELP, engine_arguments, engine_config

if TYPE_CHECKING:
    from millstream.engine.calibrate import Measured


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    engine_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each composition (default 5)")
    parser.add_argument("--name", help="of the profile (default: model, weights and processor)")
    parser.add_argument("--price", type=float, default=1.0, metavar="X", help="what an hour of the machine costs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from millstream.engine import calibrate
    from millstream.engine.assemble import assemble
    from millstream.reproduce.machine import describe
    from millstream.sched import profiles

    config = engine_config(args)
    with output.json_only(args.json):
        made = assemble(args.model, config, tune=True, notice=None if args.json else output.note)
        engine, resolved = made.engine, made.resolved
        capacity = engine.runner.capacity()
        blocks = min(capacity.blocks.values())
        compositions = calibrate.grid_of(made)
        started = time.perf_counter()
        with output.progress_bar(len(compositions) * (args.repeats + 1), "steps") as advance:
            found = calibrate.calibrate(made, compositions, args.repeats, requests=48, advance=advance)
        measured, host_s = found.measured, found.host_s
        token_bytes = made.built.kv_bytes // max(1, blocks * capacity.block_size)
        processor = describe().cpu
        name = args.name or _name(f"{made.spec.name}-{resolved.config.model.weights}-{processor}")
        profile = replace(
            calibrate.profile_of(made, found),
            name=name,
            hardware=f"{processor}, {resolved.threads} threads",
            source="measured here by millstream calibrate",
            token_bytes=int(token_bytes),
            price=args.price,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            details={
                "host_s": list(host_s),
                "errors": found.errors,
                "fit_errors": found.fit_errors,
                "samples": [_sample(one) for one in measured],
            },
        )
        path = profiles.save(profile)
        engine.close()
        took = time.perf_counter() - started
        if args.json:
            output.emit(
                {
                    "profile": name,
                    "path": str(path),
                    "seconds": took,
                    "compositions": len(measured),
                    "noise": found.noise,
                    "target": found.target,
                    "errors": found.errors,
                    "best": found.best,
                    "host_s": list(host_s),
                }
            )
            return 0
        print(f"{len(measured)} compositions, {args.repeats} times each, in {took:.0f} s")
        print(f"the host adds {host_s[0] * 1000:.2f} ms a step and {host_s[1] * 1e6:.0f} us a row")
        print(f"repeats differ by {100 * found.noise:.1f} % (mean distance from their median)")
        output.print_table(
            ("form", "error where fitted", "error where held out"),
            [
                (form, f"{100 * found.fit_errors[form]:.1f} %", f"{100 * found.errors[form]:.1f} %")
                for form in calibrate.FORMS
            ],
            right=(1, 2),
        )
        verdict = "within" if found.errors[found.best] <= found.target else "NOT within"
        print(f"{found.best} is {verdict} {100 * found.target:.1f} %, the larger of 5 % and 1.5 times the difference")
        print(f"profile {name}: millstream sim --profile {name}")
    return 0


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-").lower()[:80]


def _sample(one: Measured) -> list[float]:
    of = one.composition
    return [of.prefill, of.start, of.rows, of.context, of.shared, one.seconds, one.spread]
