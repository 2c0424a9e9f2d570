"""The command line: finds the command, and turns what goes wrong into one line and an exit status.

0 done; 1 it failed, and one line on stderr says why; 2 wrong usage; 130 interrupted. A command lives in a module of its
own, imported only when it is asked for, so that help opens at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn

from millstream import __version__
from millstream.core.errors import MillstreamError, UnknownName, nearest

ENTERED_S = time.perf_counter()

FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141

# Command, of one or two words -> (module with `arguments(parser)` and `run(args)`, what it does).
COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("serve", "serve a model over HTTP, with a playground in the browser"),
    "complete": ("complete", "continue a text, as it comes"),
    "chat": ("chat", "talk to a model in the terminal"),
    "demo": ("demo", "answer a few dozen prompts in one continuous batch, with a live view"),
    "run-batch": ("run_batch", "answer a file of requests, in the format of OpenAI's batch API"),
    "bench": ("bench", "measure throughput, latency, start-up, or the knee of step sizes"),
    "bench serve": ("bench_serve", "load a server over HTTP and measure what its clients see"),
    "sim": ("sim", "simulate a cluster of engines under recorded traffic, with the real scheduler"),
    "plan": ("plan", "how many engines of which kind a recorded load needs, by simulation"),
    "calibrate": ("calibrate", "measure how long this machine's steps take, for the simulator"),
    "train-ranker": ("train_ranker", "learn how long a model's answers will be, for policies that go by it"),
    "explain": ("explain", "every automatic decision with its reason, and where the memory goes"),
    "quantize": ("quantize", "pack a model's matrices into 4 or 8 bits"),
    "pull": ("pull", "download a model"),
    "list": ("list_models", "models that are known by name, and which are here"),
    "show": ("show", "what there is to know of a model without loading it"),
    "rm": ("rm", "remove a model that was pulled"),
    "plugins": ("plugins", "every plug-in, by extension point"),
    "papers": ("papers", "the techniques: where each lives, its switch, and whether it works"),
    "reproduce": ("reproduce", "run a paper's experiment against its baseline"),
    "build-kernels": ("build_kernels", "compile the native kernels now instead of at first use"),
    "collect-env": ("collect_env", "versions, hardware and folders, for a bug report"),
}


class UsageError(Exception):
    """A command line that cannot be read. `usage` is the short usage of the command."""

    def __init__(self, message: str, usage: str = "", exist: Sequence[str] = (), close: str | None = None) -> None:
        self.usage, self.exist, self.nearest = usage, list(exist), close
        super().__init__(message)


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving, so that the error can be told as JSON too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage().strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (`sys.argv` by default) and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    json, debug = _has(words, "--json"), _has(words, "--debug")
    _prepare_streams()
    shown_before, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0
    except UsageError as error:
        _tell(error, USAGE, json, debug)
        return USAGE
    except KeyboardInterrupt as error:
        _tell(error, INTERRUPTED, json, debug)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has left; what is still buffered has nowhere to go.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        _tell(error, FAILED, json, debug)
        return FAILED
    finally:
        warnings.showwarning = shown_before


def parser_of(command: str) -> Parser:
    """The parser of one command. Imports that command's module only."""
    module, summary = COMMANDS[command]
    parser = Parser(prog=f"millstream {command}", description=f"{summary[0].upper()}{summary[1:]}.")
    found = importlib.import_module(f"millstream.cli.{module}")
    if found.__doc__:
        parser.description = " ".join(found.__doc__.split("\n\n")[0].split()).split(": ", 1)[-1]
        parser.description = parser.description[0].upper() + parser.description[1:]
    found.arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=found.run)
    return parser


def _dispatch(words: list[str]) -> int:
    first = next((place for place, word in enumerate(words) if not word.startswith("-")), None)
    before = words if first is None else words[:first]
    root = _root_parser()
    root.parse_args(before)
    if first is None:
        root.print_help(sys.stderr)
        return USAGE
    if words[first] == "help":
        (parser_of(_command(words[first + 1 :])[0]) if words[first + 1 :] else root).print_help()
        return 0
    command, rest = _command(words[first:])
    args = parser_of(command).parse_args(rest)
    args.argv_started_s = ENTERED_S
    status: int = args.run(args)
    return status


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The command that these words begin with, and the words after it."""
    both = " ".join(words[:2])
    return (both, words[2:]) if both in COMMANDS else (_known(words[0]), words[1:])


def _known(command: str) -> str:
    if command in COMMANDS:
        return command
    close = nearest(command, COMMANDS)
    hint = f"; the nearest is {close!r}" if close else ""
    raise UsageError(
        f"there is no command {command!r}{hint}; there are: {', '.join(COMMANDS)}", exist=list(COMMANDS), close=close
    )


def _root_parser() -> Parser:
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog="millstream",
        usage="millstream [-h] [--version] COMMAND ...",
        description="One engine for serving language models, in which every technique is a plug-in.",
        epilog=f"commands:\n{listed}\n\n`millstream COMMAND --help` tells more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"millstream {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _has(words: Sequence[str], flag: str) -> bool:
    """Whether a flag was given; what follows "--" is text."""
    end = words.index("--") if "--" in words else len(words)
    return flag in words[:end]


def _tell(error: BaseException, status: int, json: bool, debug: bool) -> None:
    if debug and not isinstance(error, UsageError | KeyboardInterrupt):
        import traceback

        traceback.print_exception(error)
    ours = isinstance(error, MillstreamError | UsageError)
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif ours:
        text = " ".join(str(error).split("\n"))
    else:
        text = f"internal error: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
    with contextlib.suppress(BrokenPipeError):
        if isinstance(error, UsageError) and error.usage:
            print(error.usage, file=sys.stderr)
        print(f"millstream: {text}", file=sys.stderr, flush=True)
        if json:
            from millstream.cli.output import emit

            emit({"error": {"type": type(error).__name__, "message": text, "status": status, **_details(error)}})


def _details(error: BaseException) -> dict[str, object]:
    if isinstance(error, UnknownName):
        return {"kind": error.kind, "name": error.name, "nearest": error.nearest, "exist": error.exist}
    if isinstance(error, UsageError) and error.exist:
        return {"nearest": error.nearest, "exist": error.exist}
    if hasattr(error, "param"):
        return {"param": str(error.param), "allowed": str(getattr(error, "allowed", ""))}
    return {}


def _prepare_streams() -> None:
    # A terminal that cannot show a character must not end an answer.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    print(f"millstream: warning: {' '.join(str(message).split())}", file=sys.stderr)
