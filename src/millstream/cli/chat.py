"""`millstream chat`: talk to a model in the terminal; it remembers the conversation until /reset."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from millstream.cli.options import MODEL_HELP, engine_arguments, open_llm, sampling_arguments, sampling_params
from millstream.cli.output import note
from millstream.core.errors import BadRequest, ConfigError, MillstreamError

if TYPE_CHECKING:
    from millstream.engine.llm import LLM

HELP = """/reset            forget the conversation
/system TEXT      set the system message (and forget the conversation); without TEXT, take it away
/params           show how tokens are chosen; /params temperature=0.5 top_p=0.9 changes it, name=default takes it back
/exit             leave (so does Ctrl-D); Ctrl-C ends an answer
/help             this"""

SETTABLE: Mapping[str, type[int] | type[float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "seed": int,
    "min_tokens": int,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    sampling_arguments(parser)
    engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with open_llm(args) as llm:
        _check_template(llm)
        chat = Chat(llm, args)
        talking = sys.stdin.isatty()
        if talking:
            note(f"{args.model}. /help tells the commands.")
        with _line_history(talking):
            for line in _lines(talking):
                if line.startswith("/"):
                    if not chat.command(line):
                        break
                elif line.strip():
                    chat.say(line)
    return 0


def _check_template(llm: LLM) -> None:
    """A base model continues texts; chatting with it needs a template that it does not have."""
    try:
        llm.chat_ids([{"role": "user", "content": "x"}])
    except BadRequest as error:
        raise ConfigError(
            f"{llm.model} cannot chat: {error}. A base model continues texts: millstream complete {llm.model} TEXT"
        ) from error


class Chat:
    """A conversation: messages so far, and how the next answer is sampled."""

    def __init__(self, llm: LLM, args: argparse.Namespace) -> None:
        self.llm, self.args = llm, args
        self.system: str | None = args.system
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> None:
        """One turn. An answer that is cut short by Ctrl-C stays in the conversation as far as it came."""
        from millstream.cli.streaming import stream

        asked = {"role": "user", "content": text}
        said: list[str] = []

        def show(index: int, piece: str) -> None:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        try:
            ids = self.llm.chat_ids([*self._opening(), *self.messages, asked])
            params = sampling_params(self.args, self.llm, len(ids))
            done = stream(self.llm, None, ids, params, show, keep_interrupted=True)
        except MillstreamError as error:
            hint = " (/reset forgets the conversation)" if self.messages and isinstance(error, BadRequest) else ""
            note(f"{error}{hint}")
            return
        print(" [interrupted]" if done.interrupted else "")
        if not done.interrupted and done.output.outputs[0].finish_reason == "length":
            note("[the answer reached its limit; /params max_tokens=N raises it]")
        self.messages += [asked, {"role": "assistant", "content": "".join(said)}]

    def command(self, line: str) -> bool:
        """Does a / command; False when it ends the chat."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/reset":
            self.messages.clear()
            note("[the conversation is forgotten]")
        elif word == "/system":
            self.system = rest or None
            self.messages.clear()
            note(f"[system message {'set' if rest else 'taken away'}; the conversation is forgotten]")
        elif word == "/params":
            self._params(rest)
        elif word in ("/help", "/?"):
            note(HELP)
        else:
            note(f"there is no command {word}; there are: /reset, /system, /params, /exit, /help")
        return True

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _params(self, rest: str) -> None:
        before = dict(vars(self.args))
        try:
            for pair in rest.split():
                name, _, value = pair.partition("=")
                name = name.replace("-", "_")
                if name not in SETTABLE:
                    raise BadRequest("/params", name, ", ".join(SETTABLE))
                setattr(self.args, name, None if value == "default" else _number(name, value))
            params: Any = sampling_params(self.args, self.llm, 0)
        except BadRequest as error:
            vars(self.args).update(before)
            note(str(error))
            return
        note("  ".join(f"{name}={getattr(params, name)}" for name in SETTABLE))


def _number(name: str, value: str) -> int | float:
    try:
        return SETTABLE[name](value)
    except ValueError:
        raise BadRequest(name, value, f"a number, as {name}={'1' if SETTABLE[name] is int else '0.5'}") from None


def _lines(talking: bool) -> Iterator[str]:
    """What the user types, or the lines of stdin. Ctrl-C at the prompt clears the line; Ctrl-D ends."""
    if not talking:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /exit leaves]")


@contextlib.contextmanager
def _line_history(talking: bool) -> Iterator[None]:
    """Editing and history at the prompt where readline exists; the history is kept in MILLSTREAM_HOME."""
    if not talking:
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    from millstream.config.load import home

    path = home() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
