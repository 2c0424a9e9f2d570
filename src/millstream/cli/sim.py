"""`millstream sim`: a cluster of engines in virtual time, under recorded traffic."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from millstream.cli import output

METRICS = ("ttft", "tpot", "itl")
# Flag -> (setting, its type, help).
_FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--rate", "rate", float, "requests a second (default: as recorded)"),
    ("--speed", "speed", float, "a factor on recorded times"),
    ("--burstiness", "burstiness", float, "random gaps of this shape; 1 is Poisson, smaller is burstier"),
    ("--requests", "requests", int, "how many (default 1000); a shorter trace begins anew"),
    ("--seconds", "seconds", float, "leave out what comes later"),
    ("--max-tokens", "max_tokens", int, "the most that clients ask for, which policies know (default 4096)"),
    ("--deadline", "deadline_s", float, "seconds after which requests end"),
    ("--e2e", "e2e_s", float, "seconds that a request or workflow is wished to take, which policies know"),
    ("--router", "router", str, "which replica gets a request: least-work (default), round-robin, ..."),
    ("--prefix", "prefix", str, "radix (default) or none"),
    ("--lengths", "lengths", str, "who guesses how long outputs will be, such as history"),
    ("--preemption", "preemption", str, "recompute (default) or swap"),
    ("--host-blocks", "host_blocks", int, "of host memory, for swapped-out requests"),
    ("--blocks", "blocks", int, "of the KV cache of each replica (default: the profile's)"),
    ("--step-tokens", "step_tokens", int, "of one step (default: the profile's)"),
    ("--max-rows", "max_rows", int, "requests that are computed at once (default: the profile's)"),
    ("--plans", "plans", int, "steps in flight, 1 or 2"),
    ("--hint-error", "hint_error", float, "give policies guesses of output lengths, off by this deviation of the log"),
    ("--noise", "noise", float, "deviation of the logarithm of step times (default 0)"),
    ("--autoscaler", "autoscaler", str, "how many replicas there are: static, hpa, slo, predictive, ..."),
    ("--cold-start", "cold_start_s", float, "seconds from the order of a replica to its first request (default 0)"),
    ("--min-replicas", "min_replicas", int, "with an autoscaler (default 1)"),
    ("--max-replicas", "max_replicas", int, "with an autoscaler (default 8)"),
    ("--seed", "seed", int, "of everything random (default 0)"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a scenario in TOML or YAML; flags come before what it says")
    parser.add_argument("--trace", metavar="NAME|FILE", help="traffic (default azure-conv); --list names all")
    parser.add_argument(
        "--profile", action="append", metavar="NAME|FILE", help="the kind of engine; may be repeated, --list names all"
    )
    parser.add_argument("--replicas", metavar="N[,N]", help="how many, or how many of each profile (default 1)")
    parser.add_argument(
        "--policy", metavar="A[,B]", help="scheduling policies, the most important first (default fcfs)"
    )
    for flag, name, kind, text in _FLAGS:
        metavar = "N" if kind is int else "X" if kind is float else None
        parser.add_argument(flag, dest=name, type=kind, metavar=metavar or flag[2:].upper(), help=text)
    parser.add_argument(
        "--diurnal", metavar="PERIOD_S[,LOW]", help="days of so many seconds; the lowest rate is LOW times the highest"
    )
    parser.add_argument(
        "--bursts", metavar="EVERY_S[,FOR_S[,TIMES]]", help="at random times: for 60 seconds 3 times the rate"
    )
    parser.add_argument("--mix", action="store_true", help="shuffle lengths against arrivals")
    parser.add_argument("--oracle", action="store_true", help="policies may know true output lengths")
    parser.add_argument(
        "--slo", default="", metavar="ttft:S,tpot:S", help="limits in seconds, for goodput; also e2el and workflow"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of a plug-in, such as router.alpha=0.3",
    )
    parser.add_argument(
        "--tune", metavar="OPTION=A,B,C", help="a table of --slo with each value of an option, and the best"
    )
    parser.add_argument("--rates", metavar="A,B,C", help="a table of throughput and goodput at these rates")
    parser.add_argument(
        "--find-capacity", action="store_true", help="the largest rate that keeps --slo, at 90 and 99 %%"
    )
    parser.add_argument(
        "--find-step-time",
        action="store_true",
        help="the longest steps (meter latency-budget) with which 99 %% of the online requests keep --slo",
    )
    parser.add_argument(
        "--compare", action="append", metavar="A[,B]", help="a row of numbers for these policies; may be repeated"
    )
    parser.add_argument("--percentiles", default="99", metavar="P,Q", help="of the table (default 99)")
    parser.add_argument("--chrome", metavar="FILE", help="write all steps, for chrome://tracing or Perfetto")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw --rates, replicas or first tokens over time, as PNG or SVG"
    )
    parser.add_argument("--list", action="store_true", help="name the traces and profiles, and leave")
    parser.add_argument("--json", action="store_true", help="print JSON")


def scenario_of(args: argparse.Namespace) -> Any:
    """The scenario of a command line. Raises ConfigError, UnknownName and BadFile."""
    from millstream.config.load import blamed_on, build, merge, read_file
    from millstream.core.errors import ConfigError
    from millstream.sim.scenario import Scenario

    given: dict[str, Any] = {name: value for _, name, _, _ in _FLAGS if (value := getattr(args, name)) is not None}
    for name in ("trace",):
        if getattr(args, name):
            given[name] = getattr(args, name)
    if args.profile:
        given["profiles"] = args.profile
    if args.replicas:
        try:
            given["replicas"] = [int(one) for one in args.replicas.split(",")]
        except ValueError:
            raise ConfigError(f"--replicas {args.replicas}: numbers from 1, with commas") from None
    if args.policy:
        given["policies"] = [one.strip() for one in args.policy.split(",")]
    for flag, names in (("diurnal", ("period_s", "low")), ("bursts", ("every_s", "for_s", "times"))):
        if (text := getattr(args, flag)) is None:
            continue
        try:
            values = [float(one) for one in text.split(",")]
            given[flag] = dict(zip(names[: len(values)], values, strict=True))
        except ValueError:
            raise ConfigError(f"--{flag} {text}: up to {len(names)} numbers with commas: {', '.join(names)}") from None
    for name in ("mix", "oracle"):
        if getattr(args, name):
            given[name] = True
    file = read_file(args.config) if args.config else {}
    with blamed_on(args.config):
        scenario = build(Scenario, merge(file, given))
    for option in args.set:
        from millstream.sim.tune import parse_option, with_option

        name, values = parse_option(option)
        if len(values) > 1:
            raise ConfigError(f"--set {option}: one value; --tune tries several")
        scenario = with_option(scenario, name, values[0])
    return scenario


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args.json)
    from millstream.core.errors import BadRequest, ConfigError
    from millstream.core.request import Slo
    from millstream.sim import report
    from millstream.sim.metrics import lines
    from millstream.sim.scenario import Prepared

    scenario, slo = scenario_of(args), report.parse_slo(args.slo)
    try:
        percentiles = [float(one) for one in args.percentiles.split(",")]
    except ValueError:
        raise ConfigError(f"--percentiles {args.percentiles}: numbers from 0 to 100, such as 50,90,99") from None
    if args.find_step_time and not slo:
        raise BadRequest("slo", "none", "tpot:SECONDS or another limit, which --find-step-time searches for")
    if args.find_capacity and not slo:
        raise BadRequest("slo", "none", "ttft:SECONDS or another limit, which --find-capacity searches for")
    if args.tune:
        if not slo:
            raise BadRequest("slo", "none", "workflow:SECONDS or another limit, which --tune judges by")
        with output.json_only(args.json):
            return _tune(scenario, slo, args)
    prepared = Prepared(scenario, Slo(slo.get("ttft"), slo.get("tpot"), None, slo.get("e2el")))
    with output.json_only(args.json):
        if args.find_capacity:
            return _capacity(prepared, slo, args)
        if args.find_step_time:
            return _step_time(prepared, slo, args)
        if args.rates:
            return _rates(prepared, slo, args)
        if args.compare:
            return _compare(prepared, slo, args)
        calls = prepared.calls()
        with output.progress_bar(len(calls)) as step:
            began = time.perf_counter()
            result = prepared.run(calls=calls, keep_steps=bool(args.chrome), progress=step)
            took = time.perf_counter() - began
        found = report.found_of(result, METRICS, percentiles, slo)
        rows = report.tenants(result, slo)
        if args.chrome:
            Path(args.chrome).write_text(json.dumps(report.chrome_trace(result)))
        if args.plot:
            from millstream.sim import plots

            (plots.first_tokens if result.scaling is None else plots.replicas)(result, Path(args.plot))
        if args.json:
            tenants = [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in rows]
            output.emit({**found, "tenants": tenants, "jain": report.jain([row.service for row in rows])})
            return 0
        print("\n".join(lines(found, METRICS, percentiles, None, scenario.rate or float("inf"))))
        if result.scaling is None:
            busy = f"replicas busy {', '.join(f'{100 * one:.0f} %' for one in found['busy'])}"
        else:
            busy = (
                f"{found['replica_seconds']:.0f} replica-seconds, {found['mean_replicas']:.2f} replicas on average, "
                f"{found['peak_replicas']} at most, {found['scale_changes']} changes"
            )
        output.note(f"simulated in {took:.2f} s: {len(calls) / took:.0f} requests a second")
        print(
            f"{result.steps} steps, {busy}; "
            f"{found['preemptions']} preemptions, {found['retries']} sent again; fingerprint {result.fingerprint}"
        )
        if "workflows" in found:
            ends = " / ".join(f"{found[f'{name}_workflow_s'] or float('nan'):.2f}" for name in ("median", "p95", "p99"))
            within = f"; {100 * report.attainment(result, slo):.1f} % within their limit" if "workflow" in slo else ""
            print(f"{found['workflows']} workflows or sessions, end to end p50 / p95 / p99 {ends} s{within}")
        if len(rows) > 1:
            print()
            titles = ("tenant", "requests", "TTFT p50", "TTFT p99", "TPOT p50", "within SLO", "service")
            output.print_table(
                titles,
                [
                    (
                        row.tenant or "-",
                        row.requests,
                        f"{row.ttft_p50_s:.3f} s",
                        f"{row.ttft_p99_s:.3f} s",
                        f"{row.tpot_p50_s * 1000:.1f} ms",
                        f"{100 * row.attainment:.1f} %" if slo else "-",
                        f"{row.service:.0f}",
                    )
                    for row in rows
                ],
                right=range(1, len(titles)),
            )
            print(f"Jain's index of service: {report.jain([row.service for row in rows]):.3f}")
    return 0


def _compare(prepared: Any, slo: dict[str, float], args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from millstream.core.registry import Choice, options
    from millstream.sim.compare import compare

    stacks = {}
    for given in args.compare:
        stacks[given] = [Choice(one.strip()) for one in given.split(",")]
        for choice in stacks[given]:
            options("policy", choice)
    with output.progress_bar(len(prepared.calls()) * len(stacks)) as step:
        rows = compare(prepared, stacks, slo, step, [one for one in stacks if "srpt" in one.split(",")])
    if args.plot:
        from millstream.sim.plots import compared

        compared({prepared.scenario.trace: rows}, Path(args.plot))
    if args.json:
        output.emit([asdict(row) for row in rows])
        return 0
    titles = (
        "policy",
        "TTFT mean",
        "p99",
        "s/token mean",
        "p99",
        "Jain",
        "within SLO",
        "tokens/s",
        "hits",
        "preempted",
    )
    output.print_table(
        titles,
        [
            (
                row.policy,
                f"{row.ttft_mean_s:.3f} s",
                f"{row.ttft_p99_s:.2f} s",
                f"{row.token_mean_s:.4f}",
                f"{row.token_p99_s:.3f}",
                f"{row.fairness:.3f}",
                f"{100 * row.within:.1f} %",
                f"{row.tokens_per_s:.0f}",
                f"{100 * row.cached:.0f} %",
                row.preemptions,
            )
            for row in rows
        ],
    )
    return 0


def _tune(scenario: Any, slo: dict[str, float], args: argparse.Namespace) -> int:
    from millstream.sim import tune

    option, values = tune.parse_option(args.tune)
    with output.progress_bar(len(values), option) as step:
        found = tune.tune(scenario, option, values, slo, told=step)
    if args.json:
        trials = [{name: getattr(one, name) for name in one.__dataclass_fields__} for one in found.trials]
        output.emit({"option": option, "slo": slo, "trials": trials, "best": found.best.value})
        return 0
    output.print_table(
        (option, "within SLO", "end to end p50", "p95"),
        [
            (one.value, f"{100 * one.attainment:.1f} %", f"{one.p50_s:.2f} s", f"{one.p95_s:.2f} s")
            for one in found.trials
        ],
        right=range(1, 4),
    )
    print(f"best: {option}={found.best.value}")
    return 0


def _rates(prepared: Any, slo: dict[str, float], args: argparse.Namespace) -> int:
    from millstream.core.errors import ConfigError
    from millstream.sim import report

    try:
        rates = [float(one) for one in args.rates.split(",")]
    except ValueError:
        raise ConfigError(f"--rates {args.rates}: numbers above 0, with commas") from None
    rows = []
    for rate in rates:
        calls = prepared.calls(rate)
        with output.progress_bar(len(calls), f"{rate:g}/s") as step:
            result = prepared.run(calls=calls, progress=step)
        rows.append({"rate": rate, **report.found_of(result, METRICS, [99], slo)})
    if args.plot:
        from millstream.sim.plots import goodput

        goodput(rows, Path(args.plot))
    if args.json:
        output.emit({"rates": rows})
        return 0
    titles = ("requests/s", "served/s", "goodput/s", "within SLO", "TTFT p50", "TTFT p99", "TPOT p50", "output tok/s")
    output.print_table(
        titles,
        [
            (
                f"{row['rate']:g}",
                f"{row['request_throughput']:.2f}",
                "-" if row["request_goodput"] is None else f"{row['request_goodput']:.2f}",
                "-" if row["slo_attainment"] is None else f"{100 * row['slo_attainment']:.1f} %",
                f"{row['median_ttft_ms']:.0f} ms",
                f"{row['p99_ttft_ms']:.0f} ms",
                f"{row['median_tpot_ms']:.1f} ms",
                f"{row['output_throughput']:.0f}",
            )
            for row in rows
        ],
        right=range(len(titles)),
    )
    return 0


def _capacity(prepared: Any, slo: dict[str, float], args: argparse.Namespace) -> int:
    from millstream.sim import report

    found = {}
    for share in (0.9, 0.99):
        seen = 0

        def simulate(rate: float, share: float = share) -> Any:
            nonlocal seen
            seen += 1
            calls = prepared.calls(rate)
            with output.progress_bar(len(calls), f"{100 * share:.0f} %, {rate:.3g}/s") as step:
                return prepared.run(calls=calls, progress=step)

        found[share] = report.capacity(simulate, slo, share, prepared.scenario.rate or 1.0)
    if args.json:
        output.emit({"slo": slo, "capacity": {str(share): rate for share, rate in found.items()}})
        return 0
    for share, rate in found.items():
        said = f"{rate:.2f} requests/s" if rate else "no rate that was tried"
        print(f"{100 * share:.0f} % of requests within {args.slo}: {said}")
    return 0


def _step_time(prepared: Any, slo: dict[str, float], args: argparse.Namespace) -> int:
    from dataclasses import replace

    from millstream.core.registry import Choice
    from millstream.sched.meters import usual
    from millstream.sim import report

    scenario, calls = prepared.scenario, prepared.calls()
    profile = prepared.kinds[0][0]
    meters = scenario.meters or usual(profile.step_tokens, profile.max_rows)
    given = next((one.options for one in meters if one.name == "latency-budget"), {})
    others = [one for one in meters if one.name != "latency-budget"]

    def simulate(step_s: float) -> Any:
        budget = Choice("latency-budget", {**given, "step_s": step_s})
        tried = replace(scenario, meters=(others[0], budget, *others[1:]))
        with output.progress_bar(len(calls), f"{1000 * step_s:.1f} ms") as step:
            result = prepared.run(calls=calls, progress=step, scenario=tried)
        # Offline work has no limits to keep.
        offline = int(given.get("offline_from", 1))
        return replace(result, served=[one for one in result.served if one.call.priority < offline])

    found = report.largest(lambda step_s: report.attainment(simulate(step_s), slo) >= 0.99, 0.05)
    if args.json:
        output.emit({"slo": slo, "step_s": found})
        return 0
    said = f"steps of {1000 * found:.1f} ms at most" if found else "no step time that was tried"
    print(f"99 % of online requests within {args.slo}: {said} (meter latency-budget, step_s)")
    return 0


def _list(as_json: bool) -> int:
    from millstream.sched.profiles import kept
    from millstream.sim.published import PUBLISHED
    from millstream.sim.traces import TRACES, UNTIMED

    if as_json:
        print(json.dumps({"traces": [*TRACES, *UNTIMED], "profiles": [*kept(), *PUBLISHED]}))
        return 0
    print("traces    " + ", ".join([*TRACES, *UNTIMED]) + ", or a file")
    print("profiles  " + (", ".join(kept()) or "none of this machine: millstream calibrate MODEL makes one"))
    print("          " + ", ".join(PUBLISHED))
    return 0
