"""A sample of the public suites of schemas and tool calls (benchmarks/structured.py runs the whole of them)."""

from __future__ import annotations

import itertools
import json

import pytest

import real
from millstream.config.load import data_dir

pytest.importorskip("llguidance")
structured = pytest.importorskip("structured")


def sample(folder: str, name: str, every: int) -> list[dict]:
    if data_dir() is None:
        pytest.skip("MILLSTREAM_DATA names no folder")
    try:
        return list(itertools.islice(structured.rows(folder, name), 0, None, every))
    except FileNotFoundError:
        pytest.skip(f"MILLSTREAM_DATA has no {folder}/{name}.jsonl.gz")


@pytest.fixture(scope="module")
def llm():
    from millstream import LLM

    made = LLM(str(real.model_path("smollm2-135m")), weights="blocks", max_context=2048)
    yield made
    made.close()


@pytest.mark.parametrize(("name", "every"), [("maskbench", 12), ("json_schema_test_suite_2020_12", 6)])
def test_no_invalid_instance_fits_and_outputs_of_random_weights_are_valid(llm, monkeypatch, name, every):
    found = sample("json_schemas", name, every)
    monkeypatch.setattr(structured, "rows", lambda *_: iter(found))
    suite = structured.Suite(name)
    tokenizer = llm.tokenizer
    masks = structured.make_tokenizer(tokenizer.vocabulary, llm.assembled.spec.vocab_size, tokenizer.stop_ids)
    good = structured.compiled(suite, llm.grammars, tokenizer, masks)
    assert suite.taken == len(good) > 0.4 * len(found) and suite.invalid_taken == 0
    # The test suite holds what a grammar need not write: 1.0 for an integer, other orders of keys.
    assert suite.valid_refused <= (0 if name == "maskbench" else 0.1 * suite.valid_taken)
    assert all(told for told in suite.refused)
    judged = [
        structured._judged(schema, text, reason)
        for schema, (text, reason, _) in zip(good[:12], structured._random_outputs(llm)(good[:12], 60), strict=True)
    ]
    assert not [told for told in judged if told.startswith("INVALID")]


def test_required_calls_parse_unless_they_are_cut(llm):
    from millstream import SamplingParams

    for name, count in (("simple_python", 6), ("parallel_multiple", 4)):
        questions = sample("tools_bfcl", name, 7)[:count]
        offered = [[structured._tool(one) for one in question["function"]] for question in questions]
        outputs = llm.chat(
            [question["question"][0] for question in questions],
            SamplingParams(temperature=0.0, max_tokens=80),
            tools=offered,
            tool_choice="required",
        )
        ended = 0
        for tools, out in zip(offered, outputs, strict=True):
            one = out.outputs[0]
            if one.finish_reason == "length":
                continue
            ended += 1
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
            assert one.tool_calls and not one.text
            for call in one.tool_calls:
                assert structured._fits(schemas[call.name], call.arguments), json.dumps(call.arguments)
        assert ended > 0
