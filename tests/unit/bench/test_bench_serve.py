"""`millstream bench serve`: arrivals that do not slow down, stamps that mean what they say, words that others parse."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
import time

import pytest
from canned_server import Answer, as_json, completion, event, serving

from millstream.bench import samples, serve
from millstream.bench.backends import BACKENDS, Options
from millstream.bench.http_client import HttpClient, SseSplitter
from millstream.cli.main import main
from millstream.core.errors import BadFile, BadRequest, DownloadError, UnknownName
from millstream.sim import data, traces
from millstream.sim.arrivals import RampUp, arrival_times


def bench(capsys, port: int, *words: str) -> dict:
    """Runs the command against a canned server and returns its JSON."""
    status = main(["bench", "serve", "--port", str(port), "--skip-tokenizer-init", "--json", *words])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert status == 0, found
    return found


def load(port, sampled, times, *, backend="openai", stream=True, timeout_s=30.0, **given) -> serve.Outcome:
    async def go():
        client = HttpClient(f"http://127.0.0.1:{port}", timeout_s=timeout_s)
        try:
            run = serve.Run(client, BACKENDS[backend], BACKENDS[backend].endpoint, Options("m", stream), None)
            return await run.load(sampled, serve.Load(times, **given))
        finally:
            await client.close()

    return asyncio.run(go())


def some(count: int) -> list[samples.Sample]:
    return [samples.Sample(f"p{i}", 3, 4) for i in range(count)]


# -- arrivals


@pytest.mark.parametrize("burstiness, spread", [(0.25, 2.0), (1.0, 1.0), (16.0, 0.25)])
def test_gaps_have_the_spread_that_burstiness_asks_for(burstiness, spread):
    times = arrival_times(20_000, 50.0, burstiness, seed=3)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.02)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(spread, rel=0.1)
    assert times[-1] == pytest.approx(20_000 / 50)
    assert times == arrival_times(20_000, 50.0, burstiness, seed=3) != arrival_times(20_000, 50.0, burstiness, seed=4)


def test_an_infinite_rate_sends_all_at_once():
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_gets_faster(strategy):
    times = arrival_times(2000, math.inf, 100.0, RampUp(strategy, 10, 100), seed=1)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.fmean(gaps[:50]) == pytest.approx(1 / 10, rel=0.1)
    assert statistics.fmean(gaps[-50:]) == pytest.approx(1 / 100, rel=0.1)


@pytest.mark.parametrize(
    "make", [lambda: arrival_times(1, 0.0), lambda: arrival_times(1, 1.0, 0.0), lambda: RampUp("exponential", 0, 5)]
)
def test_rates_out_of_bounds_are_refused(make):
    with pytest.raises(BadRequest):
        make()


# -- samples


def test_random_prompts_are_of_the_asked_lengths_and_differ():
    plan = samples.Plan(num_prompts=50, input_len=40, output_len=8, range_ratio=0.5, prefix_len=10, seed=2)
    found, cut = samples.make(plan)
    assert cut == 0 and len({one.prompt for one in found}) == 50
    for one in found:
        assert len(one.prompt.split()) == one.num_prompt and 30 <= one.num_prompt <= 70 and 4 <= one.max_tokens <= 12
    assert len({tuple(one.prompt.split()[:10]) for one in found}) == 1
    assert samples.make(plan)[0] == found


def test_a_tokenizer_makes_prompts_exact():
    class Letters:
        """A begin token, and words of more than four letters in two."""

        def encode(self, text):
            return [0] + [part for word in text.split() for part in (word[:4], word[4:]) if part]

    found, _ = samples.make(samples.Plan(num_prompts=20, input_len=33, output_len=1), Letters())
    assert {len(Letters().encode(one.prompt)) for one in found} == {33}


def test_a_trace_keeps_times_lengths_and_shared_prefixes(tmp_path):
    rows = [
        {"timestamp": 5000, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 9]},
        {"timestamp": 2000, "input_length": 1024, "output_length": 9, "hash_ids": [1, 2]},
        {"timestamp": 2500, "input_length": 600, "output_length": 9, "hash_ids": [1, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found, _ = samples.make(samples.Plan("timed_trace", path))
    assert [one.at_s for one in found] == [0.0, 0.5, 3.0]
    assert [one.num_prompt for one in found] == [len(one.prompt.split()) for one in found] == [1024, 600, 1100]
    first, second, third = (one.prompt.split() for one in found)
    assert first[:1024] == third[:1024] and first[:512] == second[:512] and first[512:600] != second[512:600]
    assert serve.scaled(found, 2.0) == [0.0, 0.25, 1.5]
    scaled, cut = samples.make(samples.Plan("timed_trace", path, length_scale=0.1, max_total=100))
    assert [one.num_prompt for one in scaled] == [99, 60, 99] and [one.max_tokens for one in scaled] == [1, 1, 1]
    assert cut == 2 and scaled[0].prompt.split()[:51] == scaled[2].prompt.split()[:51]


def test_a_sharegpt_file_and_a_custom_one_are_read(tmp_path):
    share = tmp_path / "share.json"
    share.write_text(
        json.dumps([{"conversations": [{"value": "ask " * 8}, {"value": "tell " * 4}]}, {"conversations": []}])
    )
    found, _ = samples.make(samples.Plan("sharegpt", share, num_prompts=3))
    assert len(found) == 3 and {(one.num_prompt, one.max_tokens) for one in found} == {(8, 5)}
    assert len(samples.make(samples.Plan("sharegpt", share, num_prompts=3, oversample=False))[0]) == 1
    custom = tmp_path / "custom.jsonl"
    custom.write_text('{"prompt": "one"}\n{"prompt": "two", "output_tokens": 9}\n')
    plan = samples.Plan("custom", custom, num_prompts=2, shuffle=False)
    assert [(one.prompt, one.max_tokens) for one in samples.make(plan)[0]] == [("one", 256), ("two", 9)]


def test_bad_data_is_told_by_name_and_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"timestamp": 1}\n')
    with pytest.raises(BadFile, match="line 2"):
        samples.make(samples.Plan("timed_trace", path))
    with pytest.raises(UnknownName, match="azure-conv"):
        samples.make(samples.Plan("azure-con"))
    with pytest.raises(BadRequest, match="dataset_path"):
        samples.make(samples.Plan("custom"))
    with pytest.raises(BadRequest, match="self_timed"):
        serve.scaled(some(1), 1.0)


# -- the client


def test_events_are_the_same_however_the_bytes_are_cut():
    text = b'data: {"a": 1}\r\n\r\n: ping\n\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
    for size in range(1, len(text)):
        splitter = SseSplitter()
        found = [one for at in range(0, len(text), size) for one in splitter.push(text[at : at + size])]
        assert found == [b'{"a": 1}', b"one\ntwo", b"[DONE]"]


@pytest.mark.parametrize("chunked", [True, False])
def test_answers_are_whole_whatever_ends_them(chunked):
    """By chunks cut anywhere, by a length, and by the end of the connection."""
    body = json.dumps({"text": "x" * 3000}).encode()
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)] if chunked else [body]

    async def go(port):
        client = HttpClient(f"http://127.0.0.1:{port}")
        try:
            return [await client.fetch("/x", b"{}") for _ in range(3)]
        finally:
            await client.close()

    with serving(lambda seen: Answer(pieces, chunked=chunked)) as server:
        for answer in asyncio.run(go(server.port)):
            assert (answer.error, answer.status, answer.body) == (None, 200, body)
        assert server.connections == (1 if chunked else 3)


def test_a_url_that_is_none_is_refused():
    with pytest.raises(BadRequest, match="base_url"):
        HttpClient("127.0.0.1:80")
    with pytest.raises(BadRequest, match="header"):
        HttpClient("http://h", {"a": "b\r\nc: d"})


# -- loads


def test_arrivals_do_not_wait_for_a_slow_server():
    """40 requests in 0.2 s at a server that takes 0.4 s for each: all are inside at once."""
    with serving(lambda seen: completion(1, wait_s=0.4)) as server:
        out = load(server.port, some(40), arrival_times(40, 200.0))
        assert server.most == 40
        sent = sorted(seen.at for seen in server.seen)
        assert sent[-1] - sent[0] < 0.35
    found = out.result(("ttft",), (99,))
    assert found["completed"] == 40 and found["median_ttft_ms"] >= 400


def test_a_limit_holds_requests_back_and_reports_the_wait_apart():
    with serving(lambda seen: completion(1, wait_s=0.05)) as server:
        out = load(server.port, some(8), [0.0] * 8, max_concurrency=2)
        assert server.most == 2
        assert server.connections == 2
    found = out.result(("ttft", "client_queue_time", "e2el_including_client_queue"), (50, 99))
    assert found["max_concurrent_requests"] == 2
    assert found["p50_ttft_ms"] < 100 and found["p99_client_queue_time_ms"] > 120
    assert found["p99_e2el_including_client_queue_ms"] > 170


def test_times_are_those_of_the_texts_and_counts_those_of_the_server():
    """The first event has no text, so it is no first token; three tokens come 50 ms apart."""
    with serving(lambda seen: completion(3, gap_s=0.05)) as server:
        out = load(server.port, some(1), [0.0], goodput={"ttft": 1.0, "tpot": 0.2})
    call = out.calls[0]
    timing = call.timing(closed=False)
    assert timing.ttft_s > 0.045 and len(timing.gaps_s) == 2
    assert all(0.03 < gap < 0.2 for gap in timing.gaps_s)
    assert (timing.num_prompt, timing.num_output, timing.cached_tokens) == (7, 3, 3)
    assert "".join(call.pieces) == " w0 w1 w2"
    found = out.result(("ttft", "tpot", "itl", "e2el"), (99,), detailed=True)
    assert found["slo_attainment"] == 1.0 and found["request_goodput"] == pytest.approx(1 / found["duration"])
    assert found["total_token_throughput"] == pytest.approx(10 / found["duration"])
    assert found["generated_texts"] == [" w0 w1 w2"] and len(found["itls"][0]) == 2


def test_goodput_counts_what_keeps_every_limit():
    waits = iter([0.0, 0.0, 0.3, 0.0])
    with serving(lambda seen: completion(2, gap_s=0.01, wait_s=next(waits))) as server:
        out = load(server.port, some(4), [0.0, 0.05, 0.1, 0.15], goodput={"ttft": 0.15, "e2el": 5.0})
    found = out.result((), (99,))
    assert found["slo_attainment"] == 0.75 and found["completed"] == 4


def test_shed_requests_are_neither_good_nor_failed():
    def answer(seen):
        if seen.body["prompt"] in ("p1", "p3"):
            return as_json({"error": {"message": "too many"}}, 429, **{"retry-after": "3"})
        if seen.body["prompt"] == "p5":
            return as_json({"error": {"message": "no such model", "type": "x"}}, 404)
        return completion(1)

    with serving(answer) as server:
        found = load(server.port, some(6), [0.0] * 6).result(("ttft",), (99,))
    assert (found["completed"], found["shed"], found["failed"]) == (3, 2, 1)
    assert found["mean_retry_after_s"] == 3.0 and found["errors_by_kind"] == {"404: no such model": 1}


@pytest.mark.parametrize(
    "answer, said",
    [
        (Answer(completion(2).pieces[:2], headers={"content-type": "text/event-stream"}, cut=True), "connection ended"),
        (
            Answer(
                [*completion(2).pieces[:2], event({"error": {"message": "engine restarted", "code": 503}})],
                headers={"content-type": "text/event-stream"},
            ),
            "engine restarted",
        ),
        (Answer([b"data: {nonsense\n\n"], headers={"content-type": "text/event-stream"}), "cannot be read"),
        (Answer([event(b"[DONE]")], headers={"content-type": "text/event-stream"}), "without a token"),
        (completion(1, wait_s=5.0), "no answer within 0.3 s"),
    ],
)
def test_streams_that_end_badly_are_failures_with_a_reason(answer, said):
    with serving(lambda seen: answer) as server:
        found = load(server.port, some(1), [0.0], timeout_s=0.3).result(("ttft",), (99,))
    assert found["failed"] == 1 and said in next(iter(found["errors_by_kind"]))


def test_a_server_that_is_not_there_is_told():
    found = load(1, some(2), [0.0, 0.0]).result((), (99,))
    assert found["failed"] == 2 and "cannot connect" in next(iter(found["errors_by_kind"]))


def test_a_kept_connection_that_the_server_closed_loses_no_request():
    """The server hangs up after each answer without having said so."""
    length = str(sum(map(len, completion(1).pieces)))
    head = {"content-type": "text/event-stream", "content-length": length}
    with serving(lambda seen: Answer(completion(1).pieces, headers=head, cut=True)) as server:
        out = load(server.port, some(30), [i * 0.01 for i in range(30)])
    assert [call.error for call in out.calls] == [None] * 30


def test_closing_ends_what_waits_on_a_connection_that_was_used_before():
    """It looks like one that the server closed while idle, which would be sent again, without end."""

    def answer(seen):
        return Answer([b"{}"], wait_s=0.0 if seen.path == "/first" else 30.0)

    async def go(port):
        client = HttpClient(f"http://127.0.0.1:{port}")
        await client.connect(1)
        assert (await client.fetch("/first", b"{}")).error is None
        waiting = asyncio.create_task(client.fetch("/x", b"{}"))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(2.0):
            await client.close()
            ended = await waiting
        return ended.error, (await client.fetch("/x", b"{}")).error

    with serving(answer) as server:
        assert asyncio.run(go(server.port)) == ("the client was closed", "the client was closed")


BODIES = {
    "openai": ("/v1/completions", lambda body: body["prompt"], "max_tokens"),
    "openai-chat": ("/v1/chat/completions", lambda body: body["messages"][0]["content"], "max_completion_tokens"),
    "openai-responses": ("/v1/responses", lambda body: body["input"], "max_output_tokens"),
    "anthropic": ("/v1/messages", lambda body: body["messages"][0]["content"], "max_tokens"),
}


def _events(backend: str) -> list[bytes]:
    if backend == "openai-chat":
        deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}]
        usage = {"prompt_tokens": 5, "completion_tokens": 2}
        return [*(event({"choices": [{"delta": delta}]}) for delta in deltas), event({"choices": [], "usage": usage})]
    if backend == "openai-responses":
        usage = {"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}
        return [
            event({"type": "response.created", "response": {"status": "in_progress"}}),
            event({"type": "response.output_text.delta", "delta": "hm"}),
            event({"type": "response.output_text.delta", "delta": "yes"}),
            event({"type": "response.completed", "response": {"status": "completed", "usage": usage}}),
        ]
    return [
        event({"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}),
        event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hm"}}),
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "yes"}}),
        event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}),
        event({"type": "message_stop"}),
    ]


@pytest.mark.parametrize("backend", ["openai-chat", "openai-responses", "anthropic"])
def test_every_api_is_asked_and_read_in_its_own_way(backend):
    answer = Answer(_events(backend), headers={"content-type": "text/event-stream"}, gap_s=0.01)
    with serving(lambda seen: answer) as server:
        out = load(server.port, some(1), [0.0], backend=backend)
        (seen,) = server.seen
    path, text, limit = BODIES[backend]
    assert (seen.path, text(seen.body), seen.body[limit], seen.body["stream"]) == (path, "p0", 4, True)
    (call,) = out.calls
    assert call.error is None and "".join(call.pieces) == "hmyes"
    assert (call.num_prompt, call.num_output, len(call.times)) == (5, 2, 2)


@pytest.mark.parametrize(
    "backend, value, count",
    [
        ("openai", {"choices": [{"text": "a b"}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}, 2),
        ("openai-chat", {"choices": [{"message": {"content": "a b"}}], "usage": {"completion_tokens": 2}}, 2),
        ("openai-embeddings", {"data": [], "usage": {"prompt_tokens": 5, "total_tokens": 5}}, 0),
        (
            "openai-responses",
            {"status": "completed", "output": [{"content": [{"text": "a b"}]}], "usage": {"output_tokens": 2}},
            2,
        ),
        (
            "anthropic",
            {"type": "message", "content": [{"type": "text", "text": "a"}], "usage": {"output_tokens": 2}},
            2,
        ),
    ],
)
def test_whole_answers_are_read_too(backend, value, count):
    with serving(lambda seen: as_json(value)) as server:
        out = load(server.port, some(1), [0.0], backend=backend, stream=False)
    (call,) = out.calls
    assert call.error is None and call.num_output == count and len(call.times) == 1


def test_probes_are_sent_past_the_limit():
    with serving(lambda seen: completion(1, wait_s=0.0 if seen.body["prompt"] == "Hi" else 0.1)) as server:
        out = load(server.port, some(4), [0.0] * 4, max_concurrency=1, probe_rate=50.0)
    found = out.result((), (99,))
    assert found["probe_completed"] > 3 and found["probe_median_e2el_ms"] < 90


def test_limits_of_a_load_are_checked():
    for given in ({"max_concurrency": 0}, {"goodput": {"itl": 1.0}}, {"goodput": {"ttft": -1.0}}):
        with pytest.raises(BadRequest):
            serve.Load([], **given)


# -- the command


def test_the_table_has_the_words_that_others_parse(capsys):
    with serving(lambda seen: completion(3, gap_s=0.005)) as server:
        words = ["bench", "serve", "--port", str(server.port), "--skip-tokenizer-init", "--num-prompts", "4"]
        words += ["--input-len", "8", "--request-rate", "50", "--goodput", "ttft:1000", "tpot:1000"]
        assert main([*words, "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"]) == 0
        assert all(seen.body["max_tokens"] == 128 and seen.body["ignore_eos"] for seen in server.seen if seen.body)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "============ Serving Benchmark Result ============"
    names = [line[:40].strip() for line in out]
    for name in (
        "Successful requests:",
        "Failed requests:",
        "Request rate configured (RPS):",
        "Benchmark duration (s):",
        "Total input tokens:",
        "Total generated tokens:",
        "Request throughput (req/s):",
        "Request goodput (req/s):",
        "Output token throughput (tok/s):",
        "Peak output token throughput (tok/s):",
        "Peak concurrent requests:",
        "Total token throughput (tok/s):",
        "Mean TTFT (ms):",
        "Median TTFT (ms):",
        "P50 TTFT (ms):",
        "P99 TTFT (ms):",
        "Mean TPOT (ms):",
        "Median ITL (ms):",
        "P99 E2EL (ms):",
    ):
        assert names.count(name) == 1, name
    assert "---------------Time to First Token----------------" in out
    assert "-----Time per Output Token (excl. 1st token)------" in out
    assert "---------------Inter-token Latency----------------" in out
    assert out[-1] == "=" * 50
    assert out[1] == "Successful requests:                     4         "


def test_results_are_saved_under_the_names_of_vllm(capsys, tmp_path):
    with serving(lambda seen: completion(2)) as server:
        found = bench(
            capsys,
            server.port,
            "--num-prompts",
            "3",
            "--save-result",
            "--save-detailed",
            "--result-dir",
            str(tmp_path),
            "--result-filename",
            "r.json",
            "--metadata",
            "version=1",
            "run=a",
        )
        bench(
            capsys, server.port, "--num-prompts", "2", "--append-result", "--result-filename", str(tmp_path / "r.json")
        )
    first, second = map(json.loads, (tmp_path / "r.json").read_text().splitlines())
    assert first == found and first["model_id"] == "canned" and first["request_rate"] == "inf"
    assert (first["version"], first["run"], first["num_prompts"], second["num_prompts"]) == ("1", "a", 3, 2)
    assert len(first["ttfts"]) == 3 and "ttfts" not in second
    assert {"mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "request_throughput"} <= set(second)


def test_a_ready_check_waits_and_then_gives_up(capsys):
    start = time.monotonic()

    def answer(seen):
        return as_json({"error": "starting"}, 503) if time.monotonic() - start < 0.5 else completion(1)

    with serving(answer) as server:
        found = bench(capsys, server.port, "--num-prompts", "2", "--ready-check-timeout-sec", "20")
        assert found["completed"] == 2
    with serving(lambda seen: as_json({"error": {"message": "bad model"}}, 404)) as server:
        words = ["--num-prompts", "2", "--ready-check-timeout-sec", "20", "--skip-tokenizer-init"]
        assert main(["bench", "serve", "--port", str(server.port), *words]) == 1
    assert "bad model" in capsys.readouterr().err


def test_the_key_and_headers_go_along(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    with serving(lambda seen: completion(1)) as server:
        bench(capsys, server.port, "--num-prompts", "1", "--header", "x-tenant=a", "--extra-body", '{"priority": 3}')
        posted = server.seen[-1]
        assert posted.headers["authorization"] == "Bearer from-env" and posted.headers["x-tenant"] == "a"
        assert posted.body["priority"] == 3 and posted.headers["x-request-id"].endswith("-0")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--goodput", "ttft"], "ttft:200"),
        (["--goodput", "itl:5"], "ttft, tpot, e2el"),
        (["--metric-percentiles", "a"], "50,90,99"),
        (["--percentile-metrics", "tttf"], "ttft"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["--header", "nothing"], "KEY=VALUE"),
        (["--dataset-name", "azur-conv"], "azure-conv"),
        (["--self-timed"], "has times"),
        (["--num-prompts", "0"], "from 1"),
        (["--base-url", "localhost:1"], "http://HOST"),
    ],
)
def test_wrong_flags_are_told_with_what_is_allowed(words, said, capsys):
    with serving(lambda seen: completion(1)) as server:
        base = ["bench", "serve", "--port", str(server.port), "--skip-tokenizer-init", "--num-prompts", "1"]
        assert main([*base, *words]) == 1
    assert said in capsys.readouterr().err


def test_the_client_is_no_bottleneck():
    """1,000 requests at 500 a second leave on time, on a machine that also runs the server."""
    with serving(lambda seen: as_json({"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}})) as server:
        out = load(server.port, some(1000), arrival_times(1000, 500.0), stream=False)
    found = out.result(("e2el",), (50,))
    assert found["completed"] == 1000
    late = sorted(call.sent_at - call.due for call in out.calls)
    assert late[500] < 0.05


def test_models_that_cannot_be_listed_are_an_error(capsys):
    assert main(["bench", "serve", "--port", "1", "--skip-tokenizer-init"]) == 1
    assert "/v1/models" in capsys.readouterr().err


@pytest.mark.parametrize("name", traces.TRACES)
def test_public_traces_are_read(name):
    try:
        data.find(traces.TRACES[name][0], download=False)
        rows = traces.load(name)
    except DownloadError:
        pytest.skip("the trace is not on this machine")
    times = [row.at_s for row in rows]
    assert len(rows) > 90 and times[0] == 0 and times == sorted(times) and 10 < times[-1] < 5000
    assert all(row.num_prompt > 0 and row.num_output >= 0 for row in rows)
    if name.startswith("mooncake"):
        assert all(len(row.blocks) == -(-row.num_prompt // traces.BLOCK_TOKENS) for row in rows)
