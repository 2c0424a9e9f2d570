"""Random requests made after the server's own description: none may fail on the server's side."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import schemathesis
from canary import Canary
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from serving import WholeServer, whole_server

EXAMPLES = int(os.environ.get("MILLSTREAM_FUZZ_EXAMPLES", "12"))
# What ends the server, or what a fuzzer would wait for.
LEFT_OUT = ("/metrics", "/playground/{name}", "/")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[WholeServer]:
    with whole_server(tmp_path_factory.mktemp("fuzz"), "--served-model-name", "tiny") as made:
        yield made


@pytest.fixture(scope="module")
def canary(server) -> Iterator[Canary]:
    made = Canary(server.url, list(server.pids().values()))
    yield made
    made.close()


def run(server: WholeServer, canary: Canary, examples: int) -> int:
    """Sends so many requests to every operation; the number of all."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    count = 0
    for operation in schema.get_all_operations():
        found = operation.ok()
        if found.path in LEFT_OUT:
            continue

        @seed(1)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=found.as_strategy(), short=st.integers(1, 6))
        def one(case: schemathesis.Case, short: int) -> None:
            nonlocal count
            count += 1
            if isinstance(case.body, dict):
                # What is valid would be computed, at length.
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if name in case.body and isinstance(case.body[name], int) and case.body[name] > short:
                        case.body[name] = short
                if "messages" in case.body or "prompt" in case.body or "input" in case.body:
                    case.body.setdefault("max_tokens", short)
            response = case.call(base_url=server.url, timeout=30)
            case.validate_response(response, checks=[not_a_server_error])

        one()
    canary.look([])
    return count


def test_no_request_fails_on_the_side_of_the_server(server, canary):
    assert run(server, canary, EXAMPLES) > 20 * EXAMPLES / 2


@pytest.mark.long
def test_no_request_of_very_many_fails_on_the_side_of_the_server(server, canary):
    run(server, canary, 300)
