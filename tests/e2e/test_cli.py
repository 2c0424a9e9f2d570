"""The command line from end to end, on a tiny random model, and on the real small one where it is installed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import real
from millstream.cli.main import main
from millstream.engine.knee import SHARE
from tiny_files import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MILLSTREAM_HOME", str(home))
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


Json = Callable[..., dict[str, Any]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Json:
    """Runs a command with --json and returns what it printed: one line, and nothing else."""

    def run(*words: str, status: int = 0) -> dict[str, Any]:
        assert main([*words, "--json"]) == status, capsys.readouterr().err
        out = capsys.readouterr().out
        assert out.endswith("\n") and out.count("\n") == 1, out
        found: dict[str, Any] = json.loads(out)
        return found

    return run


def test_complete_streams_what_generate_gives(model, capsys):
    from millstream import LLM, SamplingParams

    assert main(["complete", model, "once", "--temperature", "0", "--max-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    with LLM(model) as llm:
        out = llm.generate("once", SamplingParams(temperature=0.0, max_tokens=12))[0]
    assert shown == out.outputs[0].text + "\n"


def test_complete_as_json_has_ids_counts_and_times(model, told):
    found = told(
        "complete", model, "once", "--max-tokens", "6", "--ignore-eos", "--n", "2", "--logprobs", "2", "--timing"
    )
    assert [one["index"] for one in found["outputs"]] == [0, 1]
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "cached_tokens": 0}
    for one in found["outputs"]:
        assert len(one["token_ids"]) == len(one["logprobs"]) == 6
        assert one["finish_reason"] == "length"
        assert all(len(position) in (2, 3) for position in one["logprobs"])
    assert found["metrics"]["ttft_s"] > 0
    assert {"import torch", "first token"} <= set(found["timing"]["phases_s"])
    assert sum(found["timing"]["phases_s"].values()) == pytest.approx(found["timing"]["total_s"], rel=1e-3)


def test_the_same_seed_gives_the_same_text(model, told):
    words = ("complete", model, "once", "--seed", "11", "--max-tokens", "8", "--temperature", "1.5")
    assert told(*words)["outputs"][0]["token_ids"] == told(*words)["outputs"][0]["token_ids"]


def test_complete_reads_stdin_and_echoes(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("twice"))
    assert main(["complete", model, "-", "--echo", "--max-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("twice")


def test_logprobs_are_shown_as_a_table(model, capsys):
    words = ["complete", model, "once", "--max-tokens", "3", "--logprobs", "1", "--temperature", "0", "--ignore-eos"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    title = next(place for place, line in enumerate(lines) if line.startswith("token "))
    assert len(lines[title + 1 :]) == 3


def test_timing_is_a_table_on_stderr(model, capsys):
    assert main(["complete", model, "once", "--max-tokens", "1", "--timing"]) == 0
    err = capsys.readouterr().err
    assert "import torch" in err and "ms after" in err


def test_chat_messages_go_through_the_template(model, told):
    plain = told("complete", model, "hi", "--max-tokens", "1")
    chat = told("complete", model, "hi", "--max-tokens", "1", "--chat")
    system = told("complete", model, "hi", "--max-tokens", "1", "--system", "be kind")
    lengths = [found["usage"]["prompt_tokens"] for found in (plain, chat, system)]
    assert lengths == sorted(set(lengths))


@pytest.mark.parametrize(
    "words, kind, said",
    [
        (["complete", "{m}", "x", "--temperature", "-1"], "BadRequest", "temperature: got -1.0"),
        (
            ["complete", "{m}", "x", "--max-tokens", "100000"],
            "BadRequest",
            "max_tokens: got 100000, allowed is at most 2047",
        ),
        (["complete", "{m}", "x" * 2100], "BadRequest", "prompt: got '2100 tokens', allowed is at most 2047"),
        (["complete", "{m}", ""], "BadRequest", "at least one token"),
        (["complete", "{m}", "x", "--set", "sched.polices=fcfs"], "ConfigError", "nearest is 'sched.policies'"),
        (["complete", "{m}", "x", "--max-context", "9999"], "ConfigError", "allowed is 2 to 2048"),
        (["complete", "{m}", "x", "--config", "/nowhere.toml"], "BadFile", "cannot be read"),
        (["complete", "./nowhere.gguf", "x"], "UnknownModel", "No file or folder is at this path"),
        (["explain", "smolm2-135m"], "UnknownModel", "the nearest is 'smollm2-135m'"),
        (["bench", "throughput", "{m}", "--output-len", "0"], "BadRequest", "output_len: got 0"),
        (["bench", "latency", "{m}", "--plot", "x.png"], "ConfigError", "bench knee"),
        (["bench", "knee", "{m}", "--op", "linear"], "ConfigError", "bench ops"),
        (["demo", "{m}", "--num-prompts", "0"], "BadRequest", "--num-prompts"),
        (["show", "./nowhere.gguf"], "UnknownModel", "No file or folder"),
        (["rm", "smollm2-135m"], "ConfigError", "add --yes"),
    ],
)
def test_bad_input_is_a_typed_error_in_one_line(words, kind, said, model, told, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    error = told(*[word.replace("{m}", model) for word in words], status=1)["error"]
    assert error["type"] == kind
    assert said in error["message"]


def test_a_config_file_and_set_reach_the_engine(model, told, tmp_path):
    (tmp_path / "c.toml").write_text(
        '[cache]\nblock_size = 32\nblocks = 40\n[sched]\npolicies = ["prefill-first", "fcfs"]\n'
    )
    found = told(
        "explain", model, "--config", str(tmp_path / "c.toml"), "--set", "sched.step_tokens=24", "--max-context", "300"
    )
    memory = found["memory"]
    assert memory["max_context"] == 300
    assert memory["block_size"] == 32
    assert [group["blocks"] for group in memory["kv_groups"].values()] == [40]
    assert memory["full_context_sequences"] == 4
    meters = next(one for one in found["decisions"] if one["name"] == "sched.meters")
    assert "splitfuse(budget=24)" in meters["value"]


def test_explain_tells_decisions_backends_and_memory(model, told, capsys):
    found = told("explain", model)
    assert all(one["value"] and one["reason"] for one in found["decisions"])
    assert found["sampling_defaults"] == {"temperature": 0.5, "top_k": 7}
    assert list(found["stop_tokens"].values()) == ["<|im_end|>"]
    assert all(one["chosen"] for one in (*found["attention"].values(), *found["ops"].values()))
    memory = found["memory"]
    parts = ("weights_bytes", "kv_bytes", "host_tier_bytes", "workspace_bytes")
    assert memory["total_bytes"] == sum(memory[part] for part in parts)
    assert memory["kv_bytes"] == sum(group["bytes"] for group in memory["kv_groups"].values())
    assert found["parameters"] * 4 == memory["weights_bytes"]
    assert main(["explain", model]) == 0
    out = capsys.readouterr().out
    assert "decisions" in out and "sequences of 2,048 tokens fit at once" in out


def test_explain_without_loading_agrees_with_explain(model, told):
    loaded, read = told("explain", model), told("explain", model, "--no-load")
    assert "attention" not in read
    for key in ("parameters", "family", "dtype", "layers"):
        assert loaded[key] == read[key]
    assert loaded["memory"]["weights_bytes"] == read["memory"]["weights_bytes"]
    assert [one["name"] for one in loaded["decisions"]] == [one["name"] for one in read["decisions"]]


def test_bench_throughput_counts_every_token(model, told):
    words = ("--input-len", "20", "--output-len", "5", "--num-prompts", "6", "--batch", "3", "--repeats", "2")
    found = told("bench", "throughput", model, *words)
    assert len(found["repeats"]) == 2
    for one in found["repeats"]:
        assert (one["requests"], one["failed"], one["prompt_tokens"], one["output_tokens"]) == (6, 0, 120, 30)
        assert one["itl_s"]["count"] == 6 * 4
        assert one["max_running"] <= 3
    assert found["cached_tokens"] == 0
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "total_tokens_per_s", "startup_s"):
        assert found[key] > 0
    for key in ("ttft_s", "itl_s"):
        assert 0 < found[key]["p50"] <= found[key]["p90"] <= found[key]["p99"]
    assert {"model", "formats", "commit", "cpu", "spread"} <= set(found)


def test_bench_latency_runs_the_batch_together(model, told, tmp_path):
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 4)
    words = (
        "--input-len",
        "16",
        "--output-len",
        "4",
        "--batch",
        "2",
        "--repeats",
        "2",
        "--text",
        str(tmp_path / "t.txt"),
    )
    found = told("bench", "latency", model, *words)
    assert found["prompts"] == "text"
    assert [one["requests"] for one in found["repeats"]] == [2, 2]
    assert found["max_running"] == 2


def test_bench_prints_tables(model, capsys):
    words = ["--input-len", "8", "--output-len", "3", "--num-prompts", "2", "--repeats", "1"]
    assert main(["bench", "throughput", model, *words]) == 0
    out, err = capsys.readouterr()
    assert "decode tokens/s" in out and "ttft" in out
    assert "repeat 1 of 1" in err


def test_the_knee_is_measured_kept_and_used(model, told, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "knee.png"
    found = told("bench", "knee", model, "--repeats", "2", "--plot", str(picture))
    sizes = [point["tokens"] for point in found["curve"]]
    assert sizes == [8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024]
    best = max(point["tokens_per_s"] for point in found["curve"])
    near = [point["tokens"] for point in found["curve"] if point["tokens_per_s"] >= SHARE * best]
    assert found["step_tokens"] == min(near)
    assert picture.read_bytes().startswith(b"\x89PNG")
    decision = next(one for one in told("explain", model)["decisions"] if one["name"] == "sched.step_tokens")
    assert decision["value"] == str(found["step_tokens"])
    assert f"measured on {found['date']}" in decision["reason"]
    assert main(["bench", "knee", model, "--repeats", "1"]) == 0
    assert f"smallest step with {SHARE:.0%} of the best" in capsys.readouterr().out


def test_a_first_start_measures_the_step_and_the_next_does_not(model, home, capsys):
    kept = home / "profiles"
    for path in kept.glob("knee-*"):
        path.unlink()
    words = ["complete", model, "abc", "--max-tokens", "2", "--temperature", "0"]
    assert main([*words, "--set", "sched.step_tokens=64"]) == 0
    assert not list(kept.glob("knee-*"))
    assert main(words) == 0
    assert "how many tokens a step should have" in capsys.readouterr().err
    (path,) = kept.glob("knee-*-dense.json")
    assert json.loads(path.read_text())["step_tokens"] in (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
    assert main(words) == 0
    assert "how many tokens a step should have" not in capsys.readouterr().err


def test_bench_ops_holds_every_native_op_against_the_machine(model, told, capsys):
    from millstream.ops.cpu import program

    if program.refusal() is not None:
        pytest.skip("no native kernels here")
    found = told("bench", "ops", model, "--repeats", "1", "--op", "linear_blocks", "--op", "sample_tokens")
    assert found["bench"] == "ops" and {"ceilings", "rows", "refused", "commit", "cpu", "machine"} <= set(found)
    assert {row["op"] for row in found["rows"]} == {"linear_blocks", "sample_tokens"}
    assert {row["implementation"] for row in found["rows"]} == {"cpu", "ref"}
    for row in found["rows"]:
        assert row["share"] > 0 and 0 < row["low"] <= row["seconds"] <= row["high"]
    assert main(["bench", "ops", model, "--repeats", "1", "--op", "kv_write8"]) == 0
    out = capsys.readouterr().out
    assert "at most, on" in out and "kv_write8" in out and "of memory" in out


def test_weights_in_a_format_by_name_and_kv_in_4_bits_are_settings(model, told):
    words = ("--input-len", "8", "--output-len", "3", "--num-prompts", "2", "--repeats", "1", "--weights", "fp6-e3m2")
    found = told("bench", "throughput", model, *words, "--set", "cache.kv=int4")
    assert found["formats"]["weights"] == "fp6-e3m2" and found["formats"]["kv"] == "int4"
    explained = told("explain", model, "--weights", "fp6-e3m2", "--set", "cache.kv=int4")
    assert set(explained["weights"]) == {"fp6-e3m2"}
    assert {one["chosen"] for one in explained["attention"].values()} == {"cpu-int4"}


def test_weights_in_blocks_are_a_flag_and_explain_says_what_they_came_to(model, told):
    words = ("--input-len", "8", "--output-len", "3", "--num-prompts", "2", "--repeats", "1", "--weights", "blocks")
    found = told("bench", "throughput", model, *words)
    assert found["formats"]["weights"] == "block8" and found["formats"]["kv"] == "int8"
    explained = told("explain", model, "--weights", "blocks")
    assert set(explained["weights"]) == {"block8"} and "multiple of 32" in str(explained["run_as"]["refused"])
    assert explained["attention"]["full"]["chosen"] == "cpu-int8"
    # Float weights rounded to 8 bits take a little more than a quarter of the room.
    dense = told("explain", model)["memory"]["weights_bytes"]
    assert explained["memory"]["weights_bytes"] < 0.4 * dense


def test_the_embedded_model_answers_in_blocks(told):
    real.model_path("smollm2-135m")
    words = ("--max-tokens", "8", "--temperature", "0", "--weights", "blocks")
    found = told("complete", "smollm2-135m", "The capital of France is", *words)
    assert "Paris" in found["outputs"][0]["text"]


def test_kernels_are_built_ahead_and_found_again(told, monkeypatch, tmp_path):
    from millstream.ops.cpu import build

    def pretend(source, directory, compiler=None):
        assert directory == tmp_path / "kernels" and source.exists()
        return directory / f"{source.stem}.so"

    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    monkeypatch.setattr(build, "build", pretend)
    found = told("build-kernels")
    kernels = ["ceilings", "elementwise", "fpx", "linear", "paged_attention", "program", "sampling"]
    assert [one["kernel"] for one in found["kernels"]] == kernels
    assert main(["build-kernels", "--compiler", "no-such-compiler", "--json"]) != 0


def test_a_start_is_timed_cold_and_warm_in_processes_of_its_own(model, told):
    found = told("bench", "startup", model, "--repeats", "1")
    assert found["startup_s"] == found["repeats"]["warm"][0]["total_s"]
    cold, warm = found["repeats"]["cold"][0], found["repeats"]["warm"][0]
    assert cold["state"].startswith("cold") and warm["state"] == "warm"
    assert "import torch" in found["phases_s"]
    for one in (cold, warm):
        assert 0 < one["total_s"] <= one["wall_s"] + 0.05


def test_the_demo_answers_every_prompt_in_one_batch(model, told, tmp_path):
    picture = tmp_path / "demo.svg"
    words = ("--num-prompts", "9", "--max-tokens", "6", "--spread", "0.2", "--svg", str(picture))
    found = told("demo", model, *words)
    assert len(found["answers"]) == found["summary"]["requests"] == 9
    assert found["summary"]["failed"] == 0
    assert found["summary"]["max_running"] > 1
    assert all(one["error"] is None and one["output_tokens"] <= 6 for one in found["answers"])
    shown = picture.read_text()
    assert shown.lstrip().startswith("<svg") and "summary" in shown


def test_the_demo_without_a_terminal_is_plain_text(model, capsys):
    assert main(["demo", model, "--num-prompts", "3", "--max-tokens", "4", "--spread", "0"]) == 0
    out, err = capsys.readouterr()
    assert "[3]" in out and "forward passes" in out and "\x1b" not in out
    assert "3 of 3 done" in err


def test_a_base_model_completes_the_demo_and_cannot_chat(tmp_path, told, capsys):
    base = str(build_model(tmp_path / "base", template=False))
    assert told("demo", base, "--num-prompts", "2", "--max-tokens", "3")["summary"]["failed"] == 0
    assert main(["chat", base]) == 1
    assert "cannot chat" in capsys.readouterr().err


def test_chat_without_a_terminal_answers_line_by_line(model, capsys, monkeypatch):
    lines = ("hello", "/params temperature=0 max_tokens=4", "/params colour=red", "again", "/nothing")
    lines += ("/system be kind", "/reset", "/exit", "never")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", model, "--max-tokens", "3", "--ignore-eos"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    assert "max_tokens=4" in err
    assert "/params: got 'colour'" in err
    assert "there is no command /nothing" in err
    assert "system message set" in err


def test_chat_remembers_until_reset(model, monkeypatch):
    import argparse

    from millstream import LLM
    from millstream.cli.chat import Chat, arguments

    parser = argparse.ArgumentParser()
    arguments(parser)
    with LLM(model) as llm:
        chat = Chat(llm, parser.parse_args([model, "--max-tokens", "3", "--temperature", "0"]))
        chat.say("one")
        chat.say("two")
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
        chat.say("x" * 3000)
        assert len(chat.messages) == 4
        chat.command("/reset")
        assert chat.messages == []


def test_show_tells_what_a_model_is(model, told, capsys):
    found = told("show", model)
    assert found["parameters"] > 0 and len(found["sha256"]) == 64
    assert main(["show", model]) == 0
    assert "architecture" in capsys.readouterr().out


def test_list_names_the_models(told, capsys):
    assert {"smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b"} <= {one["name"] for one in told("list")["models"]}
    assert main(["list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_papers_and_an_unbuilt_experiment(told, capsys):
    assert len(told("papers")["papers"]) == 79
    assert main(["reproduce", "no-such-paper", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "UnknownName"


def test_collect_env_names_no_folder_of_the_user(told, home):
    found = told("collect-env")
    assert found["packages"]["torch"] and found["cores"] >= 1
    assert str(home) not in json.dumps(found)


def test_pulled_files_are_removed_with_yes(told):
    assert told("rm", "gemma3-270m", "--yes") == {"name": "gemma3-270m", "removed": True, "freed_bytes": 0}


def test_the_module_runs_as_a_program(model, home):
    done = subprocess.run(
        [sys.executable, "-m", "millstream", "complete", model, "once", "--max-tokens", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "MILLSTREAM_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert len(json.loads(done.stdout)["outputs"][0]["token_ids"]) <= 2


def test_the_embedded_model_knows_the_capital_of_france(told):
    from millstream.models import store

    if not any(one.name == "smollm2-135m" and one.here for one in store.list_models()):
        pytest.skip("smollm2-135m is not installed (make setup)")
    found = told("complete", "smollm2-135m", "The capital of France is", "--temperature", "0", "--max-tokens", "8")
    assert "Paris" in found["outputs"][0]["text"]
    assert told("show", "smollm2-135m")["chat_template"] is True


def test_quantize_makes_a_folder_that_answers_and_explains_itself(model, told, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 40)
    words = ("--text", str(text), "--samples", "4", "--length", "64")
    for form in ("w4a8", "w8a8"):
        folder = tmp_path / form
        made = told("quantize", model, "--format", form, "--out", str(folder), *words)
        assert made["format"] == form and made["head"] == "block8" and made["path"] == str(folder)
        assert made["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
        explained = told("explain", str(folder))
        assert set(explained["weights"]) == {form, "block8"} and explained["stored_as"] == form
        read = told("explain", str(folder), "--no-load")
        assert read["memory"]["weights_bytes"] < told("explain", model, "--no-load")["memory"]["weights_bytes"] / 2
        answer = ("complete", str(folder), "the quick", "--max-tokens", "5", "--temperature", "0")
        first, again = told(*answer), told(*answer)
        assert first["outputs"] == again["outputs"] and first["outputs"]
    assert main(["quantize", model, "--out", str(tmp_path / "rtn"), "--rtn"]) == 0
    out, err = capsys.readouterr()
    assert "w4a8" in out and "layers 2 of 2" in err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--format", "w4a9"), "'w4a8'"),
        (("--group", "half"), "multiples of 32"),
        (("--group", "64"), "do not divide 32 inputs"),
        (("--format", "w8a8", "--group", "64"), "no groups"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--samples", "9999999"), "tokens"),
        (("--out", "."), "exists already"),
    ],
)
def test_quantize_says_what_is_wrong_and_leaves_nothing(model, tmp_path, monkeypatch, capsys, words, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("word " * 50)
    given = ("--out", "made", "--text", "t.txt", "--samples", "1", "--length", "16")
    assert main(["quantize", model, *given, *words]) == 1
    assert match in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
