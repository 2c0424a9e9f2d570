"""Flags that several commands share: how the engine is set up, and how tokens are chosen."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.config.schema import EngineConfig
    from millstream.core.events import Event
    from millstream.core.request import SamplingParams, Structured
    from millstream.engine.llm import LLM

MODEL_HELP = "a short name (millstream list), org/name[:file.gguf] on the hub, or a path"

# Flags whose value goes into SamplingParams as it is: (flag, type, help).
_SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("--temperature", float, "0 is greedy"),
    ("--top-p", float, "keep the likeliest tokens up to this probability"),
    ("--top-k", int, "keep this many of the likeliest tokens; 0 keeps all"),
    ("--min-p", float, "keep tokens at least this likely, relative to the likeliest"),
    ("--presence-penalty", float, "-2 to 2"),
    ("--frequency-penalty", float, "-2 to 2"),
    ("--repetition-penalty", float, "1 is off"),
    ("--seed", int, "the same seed gives the same text"),
    ("--min-tokens", int, "do not stop before"),
)


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", help="of weights and activations (default float32)")
    group.add_argument(
        "--weights",
        help="dense (default); blocks: 4 and 8 bits as stored in a GGUF file, faster; or a format, such as fp6-e3m2",
    )
    group.add_argument("--max-context", type=int, metavar="N", help="in tokens; at most what the model was made for")
    group.add_argument("--config", metavar="FILE", help="a TOML or YAML file with the config tree")
    group.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="one setting of the config tree; may be repeated"
    )


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "What is not given is taken from the model's generation_config.")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="generate at most this many (default 256, or what fits)"
    )
    for flag, kind, text in _SAMPLING:
        group.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end token")
    shape = parser.add_argument_group("structured output", "At most one of these.").add_mutually_exclusive_group()
    shape.add_argument("--json-object", action="store_true", help="the output is a JSON object")
    shape.add_argument("--json-schema", metavar="JSON", help="the output fits this JSON Schema; @FILE reads it")
    shape.add_argument("--regex", metavar="PATTERN", help="the whole output matches this")
    shape.add_argument("--choice", action="append", metavar="TEXT", help="the output is one of these; may be repeated")
    shape.add_argument("--grammar", metavar="TEXT", help="a Lark or GBNF grammar of the output; @FILE reads it")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The config of `engine_arguments`. Raises ConfigError and BadFile."""
    from millstream.config.load import blamed_on, build, merge, parse_sets, read_file
    from millstream.config.schema import EngineConfig

    short = {key: value for key in ("dtype", "weights", "max_context") if (value := getattr(args, key)) is not None}
    file = read_file(args.config) if args.config else {}
    with blamed_on(args.config):
        return build(EngineConfig, merge(file, parse_sets(args.set), {"model": short} if short else {}))


def open_llm(args: argparse.Namespace, listeners: Sequence[Callable[[Event], None]] = ()) -> LLM:
    """Loads `args.model`, downloaded first with a progress bar when it is not here."""
    from millstream.cli.output import download_progress, note

    config = engine_config(args)
    from millstream.engine.llm import LLM

    with download_progress(args.model) as progress:
        return LLM(args.model, config, listeners=listeners, progress=progress, notice=note)


def structured(args: argparse.Namespace) -> Structured | None:
    """What the output must look like. Raises BadRequest and BadFile."""
    from millstream.core.request import Structured

    if args.json_object:
        return Structured.json()
    if args.json_schema is not None:
        return Structured.json(_text(args.json_schema))
    if args.regex is not None:
        return Structured.regex(args.regex)
    if args.choice:
        return Structured.choice(args.choice)
    return None if args.grammar is None else Structured.grammar(_text(args.grammar))


def _text(given: str) -> str:
    """The text itself, or that of the file after an @."""
    if not given.startswith("@"):
        return given
    from millstream.core.errors import BadFile

    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(given[1:], f"cannot be read ({error})") from None


def sampling_params(args: argparse.Namespace, llm: LLM, num_prompt: int, **given: Any) -> SamplingParams:
    """What the flags say over the model's own defaults. Raises BadRequest."""
    over: dict[str, Any] = dict(given)
    for flag, _, _ in _SAMPLING:
        name = flag[2:].replace("-", "_")
        if (value := getattr(args, name)) is not None:
            over[name] = value
    if args.stop:
        over["stop"] = tuple(args.stop)
    if args.ignore_eos:
        over["ignore_eos"] = True
    if (shape := structured(args)) is not None:
        over["structured"] = shape
    if args.max_tokens is not None:
        over["max_tokens"] = args.max_tokens
    else:
        room = llm.assembled.engine.limits.max_context - num_prompt
        over["max_tokens"] = max(1, over.get("min_tokens", 0), min(256, room))
    return llm.get_default_sampling_params(**over)
