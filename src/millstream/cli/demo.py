"""`millstream demo`: answer a few dozen prompts in one continuous batch, watch it, and read the answers."""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millstream.cli.demo_prompts import DEMO_PROMPTS, DemoPrompt
from millstream.cli.options import MODEL_HELP, engine_arguments, open_llm
from millstream.cli.output import emit, json_only, note, seconds_in_words

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from millstream.bench.load import Ask, LoadRun
    from millstream.core.events import Event
    from millstream.engine.llm import LLM
    from millstream.sim.metrics import LoadReport

DEFAULT_MODEL = "smollm2-135m"
WIDTH = 112
SHOWN_REQUESTS, SHOWN_STEPS = 10, 6
# Columns of the live view, in characters.
ASKED, ANSWERED = 38, 52
WINDOW_S = 2.0
REFRESH_S = 0.2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default {DEFAULT_MODEL})")
    parser.add_argument("--num-prompts", type=int, default=36, metavar="N", help="how many are asked (default 36)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="no answer longer than this")
    parser.add_argument(
        "--spread", type=float, default=4.0, metavar="S", help="they arrive over this many seconds (default 4)"
    )
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same answers (default 7)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="save a picture: the busiest moment and the summary")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when done, and nothing else")
    engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from millstream.core.errors import BadRequest

    if args.num_prompts < 1:
        raise BadRequest("--num-prompts", args.num_prompts, "1 or more")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise BadRequest("--max-tokens", args.max_tokens, "1 or more")
    if not 0 <= args.spread < 3600:
        raise BadRequest("--spread", args.spread, "0 to 3600 seconds")
    with json_only(args.json):
        started = time.perf_counter()
        if not args.json:
            note(f"loading {args.model} ...")
        with open_llm(args) as llm:
            loaded_s = time.perf_counter() - started
            prompts = [DEMO_PROMPTS[place % len(DEMO_PROMPTS)] for place in range(args.num_prompts)]
            asks = _asks(llm, prompts, args)
            view = View(llm, prompts, asks, loaded_s)
            done = _drive(llm, asks, view, quiet=args.json)
            report = done.report()
            if args.json:
                emit(_as_json(llm, prompts, done, report, loaded_s))
            else:
                _print_answers(prompts, done)
                _print_summary(llm, report, loaded_s)
            if args.svg is not None:
                _save_svg(args.svg, view, llm, report, loaded_s)
                note(f"picture: {args.svg}")
            return 1 if report.failed else 0


def _asks(llm: LLM, prompts: Sequence[DemoPrompt], args: argparse.Namespace) -> list[Ask]:
    from millstream.bench.load import Ask, poisson_arrivals
    from millstream.text.chat import template_of

    try:
        template_of(llm.tokenizer)
        chats = True
    except Exception:
        # A base model continues the text instead of answering it.
        chats = False
    arrivals = poisson_arrivals(len(prompts), len(prompts) / args.spread, args.seed) if args.spread else None
    asks = []
    room = llm.assembled.engine.limits.max_context
    for place, prompt in enumerate(prompts):
        ids = (
            llm.chat_ids([{"role": "user", "content": prompt.text}]) if chats else llm.prompt_ids(prompt.text + "\n")[1]
        )
        most = min(prompt.max_tokens, args.max_tokens or prompt.max_tokens, max(1, room - len(ids)))
        params = llm.get_default_sampling_params(
            max_tokens=most, temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=args.seed + place
        )
        asks.append(Ask(tuple(ids), params, arrivals[place] if arrivals else 0.0))
    return asks


# -- watching


@dataclass(slots=True)
class View:
    """What the live view shows. The engine's thread adds steps to it, ours the texts, the screen's thread reads."""

    llm: LLM
    prompts: Sequence[DemoPrompt]
    asks: Sequence[Ask]
    loaded_s: float
    texts: dict[int, str] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    steps: deque[tuple[float, Any]] = field(default_factory=lambda: deque(maxlen=4096))
    started_s: float = field(default_factory=time.perf_counter)
    stats: Mapping[str, int] = field(default_factory=dict)
    counted_s: float = 0.0
    peak_busy: tuple[int, int] = (0, 0)
    peak: Any = None

    def hear(self, event: Event) -> None:
        from millstream.core.events import Stepped

        if isinstance(event, Stepped):
            now = time.perf_counter()
            self.steps.append((now, event))
            # Counted here, between two steps: only the engine's thread may look into the ledger.
            if now - self.counted_s > REFRESH_S / 2 or not event.running:
                self.counted_s = now
                self.stats = self.llm.assembled.engine.scheduler.ledger.stats()

    def show(self, place: int, piece: str) -> None:
        self.texts[place] = self.texts.get(place, "") + piece

    def rates(self) -> tuple[float, float]:
        """Prompt and output tokens a second, over the last moments."""
        now = time.perf_counter()
        recent = [(stamp, step) for stamp, step in list(self.steps) if now - stamp <= WINDOW_S]
        if not recent:
            return 0.0, 0.0
        span = max(now - recent[0][0] + recent[0][1].seconds, 1e-3)
        prompt = sum(step.prompt_tokens for _, step in recent)
        return prompt / span, (sum(step.tokens for _, step in recent) - prompt) / span

    def render(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        stats = self.stats
        total = sum(self.llm.assembled.resolved.blocks.values())
        used, idle = stats.get("used_blocks", 0), stats.get("idle_blocks", 0)
        steps = list(self.steps)
        last = steps[-1][1] if steps else None
        arrived = sum(ask.at_s <= time.perf_counter() - self.started_s for ask in self.asks)
        running, waiting = (last.running, last.waiting) if last else (0, 0)
        prefill, decode = self.rates()

        head = Table.grid(padding=(0, 3))
        head.add_row(
            Text.assemble(("running ", "dim"), (f"{running:>3}", "bold green")),
            Text.assemble(("waiting ", "dim"), (f"{waiting:>3}", "bold yellow")),
            Text.assemble(("arrived ", "dim"), f"{arrived:>3} of {len(self.asks)}"),
            Text.assemble(("done ", "dim"), (f"{len(self.done):>3}", "bold")),
            Text.assemble(("prompt ", "dim"), (f"{prefill:>5.0f} tok/s", "cyan")),
            Text.assemble(("output ", "dim"), (f"{decode:>5.0f} tok/s", "bold magenta")),
        )
        query, hit = stats.get("prefix_query_tokens", 0), stats.get("prefix_hit_tokens", 0)
        kv = Text.assemble(
            ("KV blocks ", "dim"),
            *_bar([(used, "green"), (idle, "blue")], total, 40),
            f" {used} used, {idle} kept for prefixes, of {total:,}",
            ("   prefix hits ", "dim"),
            f"{hit / query if query else 0:.0%}",
        )
        strip = Table.grid(padding=(0, 1))
        widest = max((step.tokens for _, step in steps[-SHOWN_STEPS:]), default=1)
        for _, step in steps[-SHOWN_STEPS:]:
            output = step.tokens - step.prompt_tokens
            strip.add_row(
                Text(f"step {step.plan:>4}", style="dim"),
                Text.assemble(*_bar([(step.prompt_tokens, "cyan"), (output, "magenta")], widest, 40)),
                Text.assemble(
                    (f"{step.prompt_tokens:>4} prompt", "cyan"),
                    " + ",
                    (f"{output:>3} output", "magenta"),
                    (f"  {step.seconds * 1000:>6.0f} ms", "dim"),
                ),
            )
        table = Table(box=None, expand=True, show_header=False, padding=(0, 1))
        for width in (11, ASKED, ANSWERED):
            table.add_column(width=width, no_wrap=True)
        live = [place for place in list(self.texts) if place not in self.done][-SHOWN_REQUESTS:]
        for place in live:
            answer = " ".join(self.texts[place].split())
            table.add_row(
                Text(self.prompts[place].kind, style="dim"),
                Text(_first_words(self.prompts[place].text, ASKED)),
                Text(answer[-ANSWERED:], style="bold"),
            )
        for _ in range(SHOWN_REQUESTS - len(live)):
            table.add_row("", "", "")
        title = f"millstream  [dim]{self.llm.model}, {self.llm.assembled.resolved.threads} threads[/dim]"
        return Panel(
            Group(head, kv, Text(""), strip, Text(""), table),
            title=title,
            title_align="left",
            box=box.ROUNDED,
            border_style="dim",
            width=WIDTH,
        )

    def remember_peak(self) -> None:
        """Keeps a picture of the busiest moment, one where prompts are computed beside answers if there is one."""
        shown = [step for _, step in list(self.steps)[-SHOWN_STEPS:]]
        if len(shown) < SHOWN_STEPS:
            return
        mixed = sum(0 < step.prompt_tokens < step.tokens for step in shown)
        busy = (min(mixed, 2), shown[-1].running)
        if busy >= self.peak_busy:
            self.peak_busy, self.peak = busy, self.render()


def _drive(llm: LLM, asks: Sequence[Ask], view: View, quiet: bool) -> LoadRun:
    from millstream.bench.load import run_load

    listeners = llm.assembled.engine.listeners
    listeners.append(view.hear)
    view.started_s = time.perf_counter()
    pictured = 0.0

    def show(place: int, piece: str) -> None:
        nonlocal pictured
        view.show(place, piece)
        if time.perf_counter() - pictured > 0.2:
            pictured = time.perf_counter()
            view.remember_peak()

    try:
        if quiet:
            return run_load(llm, asks, words=True, show=show, finished=view.done.add)
        if sys.stdout.isatty():
            from rich.live import Live

            with Live(get_renderable=view.render, refresh_per_second=1 / REFRESH_S, transient=True):
                return run_load(llm, asks, words=True, show=show, finished=view.done.add)
        last = time.perf_counter()

        def finished(place: int) -> None:
            nonlocal last
            view.done.add(place)
            if time.perf_counter() - last > 1 or len(view.done) == len(asks):
                last = time.perf_counter()
                prefill, decode = view.rates()
                step = view.steps[-1][1] if view.steps else None
                running, waiting = (step.running, step.waiting) if step else (0, 0)
                note(
                    f"{len(view.done)} of {len(asks)} done, {running} running, {waiting} waiting, "
                    f"{prefill:.0f} prompt tok/s, {decode:.0f} output tok/s"
                )

        return run_load(llm, asks, words=True, show=show, finished=finished)
    finally:
        listeners.remove(view.hear)


def _bar(parts: Sequence[tuple[float, str]], total: float, width: int) -> list[tuple[str, str]]:
    """Cells of a bar of `width`; what there is of a part, however small, is seen."""
    cells, left = [], width
    for amount, style in parts:
        count = min(left, max(1, round(width * amount / total))) if amount and total else 0
        cells.append(("█" * count, style))
        left -= count
    cells.append(("░" * left, "dim"))
    return cells


def _first_words(text: str, limit: int) -> str:
    """The line that asks: of a long prompt, the last."""
    line = [line for line in text.strip().splitlines() if line.strip()][-1]
    return line if len(line) <= limit else line[: limit - 1] + "…"


# -- afterwards


def _print_answers(prompts: Sequence[DemoPrompt], done: LoadRun) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=not sys.stdout.isatty())
    for place, (prompt, out, timing) in enumerate(zip(prompts, done.outputs, done.timings, strict=True), start=1):
        asked = " ".join(prompt.text.split())
        if len(asked) > 300:
            asked = asked[:140] + " [...] " + asked[-150:]
        console.print(Text.assemble((f"[{place}] ", "dim"), (asked, "cyan")))
        if timing.error is not None:
            console.print(Text(f"failed: {timing.error}", style="red"))
        else:
            ending = "" if out.outputs[0].finish_reason == "stop" else " …"
            console.print(Text(out.outputs[0].text.strip() + ending))
        console.print()


def _rows(llm: LLM, report: LoadReport, loaded_s: float) -> list[tuple[str, str]]:
    return [
        ("requests", f"{report.requests}" + (f" ({report.failed} failed)" if report.failed else "")),
        ("prompt tokens", f"{report.prompt_tokens:,}, {report.cached_tokens:,} of them from the prefix cache"),
        ("output tokens", f"{report.output_tokens:,}"),
        ("duration", f"{report.duration_s:.2f} s after {loaded_s:.2f} s of loading"),
        ("throughput", f"{report.output_tokens_per_s:.1f} output tok/s, {report.total_tokens_per_s:.1f} in total"),
        (
            "time to first token",
            f"p50 {seconds_in_words(report.ttft_s.p50)}, p99 {seconds_in_words(report.ttft_s.p99)}",
        ),
        ("between tokens", f"p50 {seconds_in_words(report.itl_s.p50)}, p99 {seconds_in_words(report.itl_s.p99)}"),
        ("most running at once", str(llm.assembled.engine.max_running)),
        ("forward passes", f"{report.steps}, {report.output_tokens / max(1, report.steps):.1f} output tokens each"),
    ]


def _summary(llm: LLM, report: LoadReport, loaded_s: float) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="summary", title_justify="left", title_style="bold")
    for name, value in _rows(llm, report, loaded_s):
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _print_summary(llm: LLM, report: LoadReport, loaded_s: float) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(_summary(llm, report, loaded_s))
        return
    print("summary")
    for name, value in _rows(llm, report, loaded_s):
        print(f"  {name:<22}{value}")


def _save_svg(path: Path, view: View, llm: LLM, report: LoadReport, loaded_s: float) -> None:
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    console: Console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    if view.peak is not None:
        console.print(view.peak)
    console.print(_summary(llm, report, loaded_s))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the fonts that rich links to: a picture must not load anything.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    path.write_text(
        console.export_svg(title=f"millstream demo {llm.model}", code_format=form).replace(
            "Fira Code, monospace", "Fira Code, ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
        ),
        encoding="utf-8",
    )


def _as_json(
    llm: LLM, prompts: Sequence[DemoPrompt], done: LoadRun, report: LoadReport, loaded_s: float
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": llm.model,
        "loaded_s": loaded_s,
        "summary": {**asdict(report), "max_running": llm.assembled.engine.max_running},
        "answers": [
            {
                "prompt": prompt.text,
                "text": out.outputs[0].text,
                "finish_reason": out.outputs[0].finish_reason,
                "prompt_tokens": timing.num_prompt,
                "output_tokens": timing.num_output,
                "cached_tokens": timing.cached_tokens,
                "ttft_s": timing.ttft_s,
                "e2el_s": timing.e2el_s,
                "error": timing.error,
            }
            for prompt, out, timing in zip(prompts, done.outputs, done.timings, strict=True)
        ],
    }
