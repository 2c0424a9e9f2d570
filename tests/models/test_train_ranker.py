"""`millstream train-ranker` on real models: answers are measured once, a file is written, and an engine goes by it."""

from __future__ import annotations

import json

from millstream.cli.main import main
from millstream.config.schema import CacheConfig, EngineConfig, SchedConfig
from millstream.core.registry import Choice
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.engine.assemble import assemble
from real import model_path


def test_a_ranker_is_trained_and_orders_requests(tmp_path, capsys):
    served, _ = model_path("smollm2-135m"), model_path("all-minilm-l6-v2")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "lengths.safetensors"
    rows = [
        {"prompt": f"{asked} {n}", "family": family}
        for family, asked in (
            ("word", "Answer with one word: is this an even number?"),
            ("story", "Write a long story about a dragon and a knight, and the number"),
            ("yes", "Answer yes or no: is this a prime number?"),
            ("essay", "Write an essay of many pages about the history of the number"),
        )
        for n in range(6)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["train-ranker", str(served), "--prompts", str(prompts), "--out", str(out), "--cap", "24", "--json"]
    given += ["--labels", str(tmp_path / "labels.jsonl"), "--set", 'cache.bytes="256MiB"']
    assert main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answers"] == len(rows) == told["train"] + told["held_out"] and out.is_file()
    orders = {"ranker", "prompt length", "regression", "buckets", "random", "shuffled labels"}
    assert set(told["tau"]) == orders | {"heads only"} and told["trunk"]["epoch"] == 0, "too few to choose epochs by"
    assert main([*given, "--trunk-epochs", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answers"] == 0 and set(told["tau"]) == orders, "what was measured is not generated again"

    sched = SchedConfig(policies=(Choice("ltr"), Choice("fcfs")), lengths=Choice("ranker", {"file": str(out)}))
    made = assemble(str(served), EngineConfig(sched=sched, cache=CacheConfig(bytes="256MiB")))
    chunks = []
    for number, text in enumerate(("Answer with one word: is this an even number? 7", "Write a long story. 5")):
        ids = tuple(made.tokenizer.encode(text))
        made.engine.submit(Request(number, (Tokens(ids),), SamplingParams(max_tokens=4)), chunks.append)
    made.engine.step()
    hints = [seq.view.hints for seq in made.engine.scheduler.live.values()]
    assert len(hints) == 2 and all(one.score is not None and 1 <= one.expected_output_len <= 24 for one in hints)
    while made.engine.busy:
        made.engine.step()
    assert sum(chunk.finish is not None for chunk in chunks) == 2
    assert made.engine.load().counters["guessed_requests"] == 2
    made.engine.close()
