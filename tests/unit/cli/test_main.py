"""The command line itself: errors in one line, exit statuses, help without heavy imports."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from millstream.cli import main as command_line
from millstream.cli.main import COMMANDS, main
from millstream.core.errors import BadRequest, UnknownModel

HEAVY = ("torch", "tokenizers", "rich", "jinja2", "transformers", "huggingface_hub", "numpy", "matplotlib")
HELP_LIMIT_S = 0.3


def run(*words: str, **given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millstream", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        **given,  # type: ignore[call-overload]
    )


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    """Makes `millstream list` end with an exception."""

    def install(error: BaseException) -> None:
        def fail(args: object) -> int:
            raise error

        fake = SimpleNamespace(__doc__="`x`: fails.", arguments=lambda parser: parser.add_argument("--json"), run=fail)
        fake.arguments = lambda parser: parser.add_argument("--json", action="store_true")
        real = command_line.importlib.import_module
        monkeypatch.setattr(
            command_line.importlib,
            "import_module",
            lambda name: fake if name == "millstream.cli.list_models" else real(name),
        )

    return install


def test_no_command_parser_imports_anything_heavy():
    code = (
        "import sys\n"
        "from millstream.cli.main import COMMANDS, main, parser_of\n"
        "for command in COMMANDS: parser_of(command).format_help()\n"
        "main(['--help'])\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("--help",), ("complete", "--help"), ("reproduce", "--help")])
def test_help_takes_less_than_a_third_of_a_second_of_work(words):
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Processor time: others may be using the machine while the tests run.
    assert min(taken) < HELP_LIMIT_S


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: millstream {command}")
    assert main(["help", *command.split()]) == 0
    assert capsys.readouterr().out == shown


def test_the_version_is_told(capsys):
    import millstream

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"millstream {millstream.__version__}\n"


def test_without_a_command_help_goes_to_stderr_and_the_status_is_two(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "commands:" in err


@pytest.mark.parametrize(
    "typed, meant",
    [("complet", "complete"), ("chta", "chat"), ("colect-env", "collect-env"), ("paper", "papers"), ("benhc", "bench")],
)
def test_an_unknown_command_names_the_nearest(typed, meant, capsys):
    assert main([typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"there is no command {typed!r}; the nearest is {meant!r}" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["complete"], "required: model, text"),
        (["complete", "m", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["bench", "speed", "m"], "invalid choice: 'speed'"),
        (["list", "--hre"], "unrecognized arguments: --hre"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage_shows_the_usage_and_ends_with_two(words, said, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: millstream")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("words", [["list", "--json", "--hre"], ["nope", "--json"], ["rm", "--json"]])
def test_wrong_usage_with_json_is_one_line_of_json(words, capsys):
    assert main(words) == 2
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out)["error"]["status"] == 2


def test_json_after_a_double_dash_is_text(capsys):
    assert main(["nope", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_our_errors_are_one_line_without_traceback(raising, capsys):
    raising(BadRequest("temperature", -1, "a number from 0 to 100"))
    assert main(["list"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "millstream: temperature: got -1, allowed is a number from 0 to 100\n"


def test_debug_shows_where_an_error_came_from(raising, capsys):
    raising(BadRequest("temperature", -1, "a number"))
    assert main(["list", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_as_json_carries_what_exists_and_what_is_nearest(raising, capsys):
    raising(UnknownModel("smolm2", ["smollm2", "gemma3"]))
    assert main(["list", "--json"]) == 1
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    error = json.loads(out)["error"]
    assert (error["type"], error["nearest"], error["exist"]) == ("UnknownModel", "smollm2", ["gemma3", "smollm2"])


def test_an_internal_error_says_that_it_is_one(raising, capsys):
    raising(ZeroDivisionError("division by zero"))
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert err == "millstream: internal error: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_an_interrupt_ends_with_130(raising, capsys):
    raising(KeyboardInterrupt())
    assert main(["list"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "millstream", "list"], stdout=out, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert done.stderr == b""
    assert done.returncode == command_line.PIPE_CLOSED


def test_warnings_are_one_line_on_stderr_and_the_handler_is_put_back(monkeypatch, capsys):
    before = warnings.showwarning

    def warn(args: object) -> int:
        warnings.showwarning("two\nlines", UserWarning, "file.py", 1)  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr("millstream.cli.list_models.run", warn)
    assert main(["list"]) == 0
    assert capsys.readouterr().err == "millstream: warning: two lines\n"
    assert warnings.showwarning is before
