"""What requests ask of an output's form, in each of the ways that clients write it."""

from __future__ import annotations

import pytest

from millstream.core.errors import BadRequest
from millstream.core.request import Structured
from millstream.serve.structured import structured_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, None),
        ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structured.json()),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Structured.json(SCHEMA, strict=False)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Structured.json(SCHEMA),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Structured.json(SCHEMA, strict=False),
        ),
        ({"guided_json": SCHEMA}, Structured.json(SCHEMA)),
        ({"guided_json": '{"type": "integer"}'}, Structured("json_schema", '{"type": "integer"}')),
        ({"guided_regex": "a+", "guided_decoding_backend": "auto"}, Structured.regex("a+")),
        ({"guided_choice": ["a", "b"]}, Structured.choice(["a", "b"])),
        ({"guided_grammar": 'root ::= "a"'}, Structured.grammar('root ::= "a"')),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}}, Structured.json(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, Structured.json()),
        ({"structured_outputs": {"regex": "a", "json": None, "backend": "guidance"}}, Structured.regex("a")),
        ({"structured_outputs": {"choice": ["x"]}}, Structured.choice(["x"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Structured.grammar('start: "a"')),
        ({"structured_outputs": {"json": True}}, Structured("json_schema", "true")),
    ],
)
def test_every_way_to_ask_comes_to_the_same(given, want):
    found = structured_of(given)
    assert (found and found[0]) == want


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [], "strict": True}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
         "response_format.json_schema.strict"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": ""}, "guided_json"),
        ({"guided_json": {"a": float("inf")}}, "guided_json"),
        ({"guided_grammar": "x" * 300_000}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": 5}, "structured_outputs"),
        ({"structured_outputs": {"regex": None}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "backend": "outlines"}}, "structured_outputs.backend"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}, "structured_outputs.whitespace_pattern"),
        ({"guided_regex": "a", "guided_decoding_backend": "xgrammar:no-fallback"}, "guided_decoding_backend"),
        ({"guided_json": {}, "guided_whitespace_pattern": "x"}, "guided_whitespace_pattern"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_its_field(given, param):
    with pytest.raises(BadRequest) as caught:
        structured_of(given)
    assert caught.value.param == param
