"""Metrics: the text that is scraped, the names that others look for, and exact amounts for a scripted run."""

from __future__ import annotations

import asyncio
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from watched_bench import WatchedBench

from millstream.core.client import Chunk, Load
from millstream.core.errors import ConfigError
from millstream.core.request import Slo
from millstream.core.sequence import Finish
from millstream.serve import families
from millstream.serve.metrics import CONTENT_TYPE, Metrics, token_bounds
from millstream.serve.observatory import Observatory, WatchConfig
from millstream.serve.records import Record

# What dashboards, autoscalers and routers made for vLLM query, as far as it applies: no adapters, no speculation, no
# cache outside of the engine.
ALIASES = {
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc cache_config_info",
    "counter": "prompt_tokens generation_tokens request_success prefix_cache_queries prefix_cache_hits num_preemptions"
    " corrupted_requests",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds"
    " request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds"
    " request_prefill_time_seconds request_decode_time_seconds request_inference_time_seconds request_prompt_tokens"
    " request_generation_tokens request_params_n request_params_max_tokens request_max_num_generation_tokens"
    " iteration_tokens_total",
}
HTTP = {
    "http_requests": "counter",
    "http_request_duration_seconds": "histogram",
    "http_request_size_bytes": "summary",
    "http_response_size_bytes": "summary",
}


def families_of(metrics: Metrics):
    return {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}


def record(**given):
    return Record(**({"id": "x", "operation": "chat", "route": "/r", "status": 200, "total_s": 1.0} | given))


def test_the_text_parses_and_has_every_name_that_others_look_for_from_the_start():
    metrics = Metrics("tiny")
    metrics.loaded(Load(0, 0, 10, 10, {"steps": 0}))
    metrics.describe_cache(block_size=64, num_gpu_blocks=10)
    metrics.http("GET", "/v1/models", 200, 0.1, 0, 10)
    found = families_of(metrics)
    for kind, names in ALIASES.items():
        for name in names.split():
            assert found[f"vllm:{name}"].type == kind, name
            if kind == "gauge" or name == "request_success":
                continue
            assert found[f"vllm:{name}"].samples, f"{name} is not there before the first request"
    for name, kind in HTTP.items():
        assert found[name].type == kind
    assert found["process_resident_memory_bytes"].samples and found["process_open_fds"].samples
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_every_family_has_our_name_a_help_text_and_the_model_on_every_series():
    bench = WatchedBench()
    bench.begin([1, 2, 3], 2)
    bench.finish()
    for name, family in families_of(bench.watched.metrics).items():
        assert family.documentation, name
        assert name.startswith(("millstream_", "vllm:", "http_")), name
        if not name.startswith("http_"):
            assert all(s.labels["model_name"] == "tiny" and s.labels["engine"] == "0" for s in family.samples), name


def test_an_alias_is_the_same_number_under_another_name():
    bench = WatchedBench()
    bench.begin([1, 2, 3, 4, 5], 6)
    bench.finish()
    named = families_of(bench.watched.metrics)
    for family in bench.watched.metrics.families:
        for alias in family.aliases:
            theirs = [(s.labels, s.value) for s in named[alias].samples]
            assert theirs == [(s.labels, s.value) for s in named[family.name].samples], alias


def test_counters_move_by_exact_amounts():
    bench = WatchedBench(budget=8)
    bench.begin([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 3)  # two chunks: 8 and 4
    bench.run()
    bench.begin([1, 2, 3, 4, 5, 6, 7, 8, 40], 2, tenant="zeta")  # 8 tokens are there already
    bench.begin([20, 21, 22], 4, n=2)
    bench.finish()
    got = bench.samples()

    def value(name, **labels):
        return got[(f"millstream_{name}", tuple(sorted(labels.items())))]

    assert value("prompt_tokens_total") == 12 + 9 + 3
    assert value("generation_tokens_total") == 3 + 2 + 2 * 4
    assert value("tenant_tokens_total", tenant="acme", kind="prompt") == 15
    assert value("tenant_tokens_total", tenant="acme", kind="generation") == 11
    assert value("tenant_tokens_total", tenant="acme", kind="cached") == 0
    assert value("tenant_tokens_total", tenant="zeta", kind="prompt") == 9
    assert value("tenant_tokens_total", tenant="zeta", kind="cached") == 8
    assert value("request_success_total", finished_reason="length") == 4
    assert value("requests_total", operation="chat", status="200") == 3
    assert value("prefix_cache_hits_total") == 8
    assert value("prefix_cache_queries_total") == 11 + 8 + 2
    assert value("num_preemptions_total") == 0
    assert value("requests_inside") == value("requests_running") == value("requests_waiting") == 0
    assert value("request_latency_seconds_count") == 3
    assert value("time_to_first_token_seconds_count") == 3
    assert value("inter_token_latency_seconds_count") == 2 + 1 + 3 + 3
    assert value("request_queue_seconds_count") == value("request_decode_seconds_count") == 4
    assert value("request_prompt_tokens_sum") == 24
    assert value("request_generation_tokens_sum") == 13
    assert value("request_longest_output_tokens_sum") == 3 + 2 + 4
    assert value("request_params_n_sum") == 4 and value("request_params_max_tokens_sum") == 9
    steps = bench.engine.num_steps
    assert value("step_seconds_count") == value("step_tokens_count") == value("step_plan_seconds_count") == steps
    computed = value("step_computed_tokens_total", phase="prefill") + value(
        "step_computed_tokens_total", phase="decode"
    )
    assert computed == value("step_tokens_sum")


def test_times_are_those_of_the_clock():
    bench = WatchedBench(budget=8)
    bench.begin(list(range(12)), 4)  # chunks end after 1 and 2 seconds, tokens come at 2, 3, 4 and 5
    bench.finish()
    got = bench.samples()
    assert got[("millstream_time_to_first_token_seconds_sum", ())] == 2.0
    assert got[("millstream_inter_token_latency_seconds_sum", ())] == 3.0
    assert got[("millstream_request_latency_seconds_sum", ())] == 5.0
    assert (
        got[("millstream_request_prefill_seconds_sum", ())] + got[("millstream_request_queue_seconds_sum", ())] == 2.0
    )
    assert got[("millstream_request_decode_seconds_sum", ())] == 3.0
    assert got[("millstream_time_per_output_token_seconds_sum", ())] == 1.0


def test_preemptions_are_counted():
    bench = WatchedBench(num_blocks=6)
    for place in range(4):
        bench.begin([place, *range(7)], 10)
    bench.finish()
    got = bench.samples()
    count = got[("vllm:num_preemptions_total", ())]
    assert count == got[("millstream_preemptions_total", (("how", "recompute"),))] > 0


@pytest.mark.parametrize("how", ["finished", "left", "failed", "refused"])
def test_a_request_ends_once_whatever_happens(how, caplog):
    bench = WatchedBench()
    caplog.set_level(logging.INFO, "millstream.serve.requests")
    call = bench.begin([1, 2, 3], 6)
    bench.step()
    status = {"finished": 200, "left": 499, "failed": 500, "refused": 400}[how]
    if how == "finished":
        bench.run()
    else:
        bench.engine.abort(0)
    assert call.end(status) is not None
    assert call.end(500) is None and call.end(200) is None
    got = bench.samples()
    ended = {key: value for key, value in got.items() if key[0] == "millstream_requests_total"}
    assert ended == {("millstream_requests_total", (("operation", "chat"), ("status", str(status)))): 1}
    assert sum(value for key, value in got.items() if key[0] == "millstream_request_success_total") == 1
    assert got[("millstream_requests_inside", ())] == 0
    assert len(caplog.records) == 1


def test_an_output_whose_client_left_ends_as_aborted_and_is_not_counted_again():
    bench = WatchedBench()
    call = bench.begin([1, 2, 3], 6)
    bench.step()
    record = call.end(499)
    assert record.finish == ("abort",) and record.output_tokens == 1
    # What the engine still says of it changes no terminal count.
    bench.engine.abort(0)
    got = bench.samples()
    assert got[("millstream_requests_total", (("operation", "chat"), ("status", "499")))] == 1


def test_service_levels_are_met_or_not():
    bench = WatchedBench(budget=8)
    bench.begin([1, 2, 3], 4, ttft_s=1.5, tpot_s=0.5, deadline_s=60.0)
    bench.finish()
    metrics = bench.watched.metrics
    assert metrics.slo.total("ttft", "true") == 1 and metrics.slo.total("ttft", "false") == 0
    assert metrics.slo.total("tpot", "false") == 1 and metrics.slo.total("deadline", "true") == 1
    # Shed: what was asked for was not given. One token has no pace.
    metrics.ended(record(status=429, shed="queue_full", slo=Slo(1.0, 1.0, 1.0)))
    metrics.ended(record(slo=Slo(tpot_s=1.0), finish=("stop",), ttft_s=0.5, longest_output=1))
    metrics.ended(record(slo=Slo(deadline_s=9.0), finish=("timeout",)))
    assert metrics.slo.total("ttft", "false") == 1 and metrics.slo.total("tpot", "false") == 2
    assert metrics.slo.total("tpot", "true") == 0 and metrics.slo.total("deadline", "false") == 2
    assert metrics.shed.total("queue_full") == 1


def test_what_is_shed_is_counted_by_reason_and_is_no_latency():
    metrics = Metrics("tiny", process=False)
    metrics.ended(record(status=429, shed="queue_full"))
    metrics.ended(record(status=503, shed="draining"))
    assert metrics.shed.total("queue_full") == metrics.shed.total("draining") == 1
    assert metrics.e2e_s.count() == 0 and metrics.requests.total("chat", "429") == 1


def test_sums_of_an_engine_outlive_it():
    metrics = Metrics("tiny", process=False)
    metrics.loaded(Load(1, 2, 5, 10, {"prefix_query_tokens": 100, "prefix_hit_tokens": 40, "idle_blocks": 3}))
    metrics.restarted()
    assert metrics.running.value() == metrics.waiting.value() == 0
    metrics.loaded(Load(0, 1, 9, 10, {"prefix_query_tokens": 7, "prefix_hit_tokens": 0, "idle_blocks": 9}))
    families_of(metrics)
    assert metrics.prefix_queries.total() == 107 and metrics.prefix_hits.total() == 40
    assert metrics.restarts.total() == 1
    assert metrics.kv_usage.value() == pytest.approx(0.1)
    metrics.loaded(Load(0, 1, 9, 10, {"prefix_query_tokens": 9, "prefix_hit_tokens": 1, "corrupted_requests": 2}))
    families_of(metrics)
    assert metrics.prefix_queries.total() == 109 and metrics.prefix_hits.total() == 41
    assert metrics.corrupted.total() == 2


def test_an_engine_that_is_away_is_down_and_its_gauges_stay():
    metrics = Metrics("tiny", process=False)
    metrics.loaded(Load(0, 1, 9, 10, {"steps": 1}))
    metrics.loaded(Load(3, 0, 0, 10))
    assert metrics.engine_up.value() == 0 and metrics.kv_usage.value() == pytest.approx(0.1)
    metrics.loaded(None, ready=False)
    assert metrics.engine_up.value() == 0 and metrics.ready.value() == 0


def test_label_values_are_bounded(monkeypatch):
    monkeypatch.setattr(families, "MAX_SERIES", 8)
    metrics = Metrics("tiny", process=False)
    for place in range(10_000):
        metrics.generated(f"tenant-{place}", 1)
        metrics.http("GE\nT", f"/{place}", 200, 0.0, 0, 0)
    assert len(metrics.tenant_tokens.values) == 9
    assert metrics.tenant_tokens.total("other", "other") == 10_000 - 8
    assert sum(metrics.tenant_tokens.values.values()) == 10_000
    assert len(metrics.text()) < 200_000


def test_label_values_cannot_break_the_text():
    metrics = Metrics('a"b\\c\nd', process=False)
    metrics.generated('x"} 1\nevil_metric 1', 1)
    found = families_of(metrics)
    assert "evil_metric" not in found
    assert found["millstream_generation_tokens"].samples[0].labels["model_name"] == 'a"b\\c\nd'


def test_bounds_of_tokens_end_at_the_context():
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_bounds(99) == (1, 2, 5, 10, 20, 50)
    assert token_bounds(0) == (1,)


def test_a_joined_chunk_counts_as_the_tokens_it_holds():
    now = [10.0]
    watched = Observatory(Metrics("tiny", process=False), now=lambda: now[0])
    call = watched.begin("id", "chat", "/v1/chat/completions")
    call.inside(1)
    now[0] = 11.0
    call.heard(Chunk(1, 0, (5,)))
    now[0] = 15.0
    call.heard(Chunk(1, 0, (6, 7, 8, 9)))
    assert watched.metrics.itl_s.count() == 4 and watched.metrics.itl_s.sum() == 4.0
    call.heard(Chunk(1, 0, (1,), finish=Finish.STOP))
    assert call.end(200).output_tokens == 6
    assert watched.metrics.generation_tokens.total() == 6


def test_what_rewrites_its_output_counts_the_tokens_of_the_whole():
    watched = Observatory(Metrics("tiny", process=False))
    call = watched.begin("id", "text_completion", "/v1/completions")
    call.heard(Chunk(1, 0, replaced=(1, 2, 3), finish=Finish.LENGTH))
    assert call.end(200).output_tokens == 3 and watched.metrics.generation_tokens.total() == 3


def test_a_fold_that_fails_is_logged_once_and_fails_nobody(caplog, monkeypatch):
    watched = Observatory(Metrics("tiny", process=False))
    monkeypatch.setattr(watched.metrics, "ended", lambda record: 1 / 0)
    for _ in range(3):
        assert watched.begin("id", "chat", "/r").end(200) is not None
    assert sum("failed; what it should count" in line.message for line in caplog.records) == 1


def test_the_event_loop_is_probed():
    metrics = Metrics("tiny", process=False)
    now = [0.0]

    async def probe():
        task = asyncio.create_task(metrics.watch_loop(lambda: now.__setitem__(0, now[0] + 0.35) or now[0]))
        await asyncio.sleep(0.4)
        task.cancel()

    asyncio.run(probe())
    assert metrics.loop_lag.count() >= 1
    assert metrics.loop_lag.sum() == pytest.approx(0.1 * metrics.loop_lag.count())


def test_what_parts_count_themselves_is_there_under_their_names():
    metrics = Metrics("tiny", process=False)
    metrics.describe_cache(kv_bytes=1000, block_size=16)
    metrics.loaded(Load(0, 0, 6, 10, {"guide_cache_hits": 3, "prefix_hit_tokens": 9}))
    metrics.sources.append(lambda: {"grammar_refused": 2, "grammar_cache_bytes": 77})
    families_of(metrics)
    assert metrics.part_counters.values == {("guide_cache_hits",): 3, ("grammar_refused",): 2}
    assert metrics.part_levels.value("grammar_cache_bytes") == 77
    assert metrics.kv_bytes.value("device", "used") == 400 and metrics.kv_bytes.value("device", "total") == 1000


def test_what_may_be_set_is_checked_and_holds():
    watched = Observatory.of(WatchConfig(timeline_requests=3), "tiny", 256)
    assert watched.tracer is None and watched.timelines.max_requests == 3
    with pytest.raises(ConfigError, match=r"serve\.watch\.timeline_bytes: got -1"):
        WatchConfig(timeline_bytes=-1)
    with pytest.raises(ConfigError, match="the OTLP endpoint"):
        Observatory.of(WatchConfig(otlp_endpoint="nowhere"), "tiny")
