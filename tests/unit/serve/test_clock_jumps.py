"""The wall clock of the server jumps: nothing is late, nothing is negative, nothing is lost."""

from __future__ import annotations

import itertools
import time

from serving import app_server, until


def test_an_hour_back_and_forth_at_every_look_changes_no_answer_and_no_count(tmp_path, monkeypatch):
    real, real_ns = time.time, time.time_ns
    hours = itertools.cycle((3600.0, -3600.0, 0.0))
    with app_server(tmp_path) as server:
        want = server.chat("hi", max_tokens=20).json["choices"][0]["message"]
        monkeypatch.setattr(time, "time", lambda: real() + next(hours))
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(next(hours) * 1e9))
        for streams in (False, True):
            for _ in range(5):
                answer = server.chat("hi", max_tokens=20, deadline_s=20, stream=streams)
                assert answer.status == 200
                if not streams:
                    assert answer.json["choices"][0]["message"] == want
        assert server.get("/ready").status == server.get("/health/deep").status == 200
        kept = server.post("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 2}).json["id"]
        assert server.get(f"/v1/responses/{kept}").status == 200
        until(server.idle, "something is left inside")
        times = [(one.total_s, one.ttft_s, one.queue_s, one.tpot_s or 0.0) for one in server.records if one.finish]
        assert len(times) >= 12 and all(0.0 <= value < 20.0 for row in times for value in row)
        lines = server.get("/metrics").body.decode().splitlines()
        samples = [line for line in lines if line and not line.startswith("#")]
        assert samples and all(float(line.rsplit(" ", 1)[1]) >= 0 for line in samples)
        timeline = server.get(f"/v1/requests/{answer.headers['x-millstream-request-id']}/timeline").json
        stamps = [entry["at_s"] for entry in timeline["entries"]]
        assert stamps == sorted(stamps) and 0 <= stamps[0] <= stamps[-1] < 20.0
