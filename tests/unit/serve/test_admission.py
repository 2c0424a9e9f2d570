"""The gate: how much may wait, how long that would take, and what each tenant may have of it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from millstream.core.request import Slo
from millstream.serve.admission import REQUEST_TOKENS, Admission, Place
from millstream.serve.caller import Caller, Overloaded
from millstream.serve.config import AdmissionConfig

ALICE, BOB = Caller("1", "alice"), Caller("2", "bob")
BATCH = Caller("3", "alice", background=True)
NONE = Slo()


class Bench:
    def __init__(self, **config: Any) -> None:
        self.at = 100.0
        self.draining = False
        self.losses = 0
        self.gate = Admission(AdmissionConfig(**config), lambda: self.draining, lambda: self.at, lambda: self.losses)

    def enter(self, tokens: int = 10, requests: int = 1, caller: Caller = ALICE, slo: Slo = NONE) -> Place:
        self.gate.look(caller)
        return self.gate.enter(caller, tokens, requests, slo)

    def refused(self, tokens: int = 10, requests: int = 1, caller: Caller = ALICE, slo: Slo = NONE) -> Overloaded:
        with pytest.raises(Overloaded) as caught:
            self.enter(tokens, requests, caller, slo)
        return caught.value

    def serve(self, places: list[Place], tokens_per_s: float) -> None:
        """The first tokens of all, one after the other."""
        for place in places:
            self.at += place.tokens / tokens_per_s
            place.first_token()


def test_a_full_queue_takes_nothing_until_somebody_has_a_token() -> None:
    bench = Bench(queued_requests=3)
    places = [bench.enter() for _ in range(3)]
    assert bench.refused().reason == "queue_full"
    places[0].first_token()
    bench.enter()
    assert bench.refused().status == 429
    places[1].leave()
    bench.enter()
    assert bench.gate.waiting_requests == 3


def test_outputs_count_and_tokens_count() -> None:
    bench = Bench(queued_requests=10, queued_tokens=100)
    bench.enter(tokens=60, requests=4)
    assert bench.refused(tokens=50).reason == "queue_tokens"
    assert bench.refused(requests=7).reason == "queue_full"
    bench.enter(tokens=40, requests=6)


def test_an_empty_queue_takes_what_is_larger_than_the_queue() -> None:
    bench = Bench(queued_requests=1, queued_tokens=10)
    place = bench.enter(tokens=1000, requests=8)
    assert bench.refused().reason == "queue_full"
    place.first_token()
    bench.enter()


def test_a_seat_is_given_back_once() -> None:
    bench = Bench(queued_requests=5, tenant_requests=5)
    place = bench.enter()
    for _ in range(3):
        place.first_token()
        place.leave()
    assert bench.gate.waiting_requests == bench.gate.waiting_tokens == 0
    assert not bench.gate._queue and not bench.gate._tenants


def test_the_wait_is_what_waits_by_the_rate_at_which_it_leaves() -> None:
    bench = Bench(max_wait_s=5.0)
    bench.serve([bench.enter(tokens=100) for _ in range(50)], tokens_per_s=1000)
    assert 900 < bench.gate.rate * 100 / (100 + REQUEST_TOKENS) < 1100
    assert bench.gate.wait_s() == 0, "nobody waits"
    waiting = [bench.enter(tokens=100) for _ in range(45)]
    assert 3 < bench.gate.wait_s() < 6, "it was behind before, and remembers how fast it is then"
    bench.at += 1.0
    bench.serve(waiting[:1], 1000)
    assert 3 < bench.gate.wait_s() < 7
    for _ in range(30):
        try:
            waiting.append(bench.enter(tokens=100))
        except Overloaded as error:
            assert error.reason == "predicted_wait" and 1 <= error.retry_after_s <= 60
            break
    else:
        pytest.fail("the queue has no end")
    assert 40 <= len(waiting) <= 60


def test_a_burst_that_the_engine_takes_at_once_is_not_turned_away() -> None:
    """A server that had one request at a time does not know how many it can do at once."""
    bench = Bench(max_wait_s=1.0)
    for _ in range(20):
        bench.serve([bench.enter(tokens=20)], tokens_per_s=100)
    places = [bench.enter(tokens=20) for _ in range(200)]
    bench.at += 0.3
    for place in places:
        place.first_token()
    assert bench.gate.waiting_requests == 0


def test_short_prompts_behind_long_work_do_not_make_longer_ones_look_slow() -> None:
    bench = Bench(max_wait_s=30.0)
    for _ in range(4):
        place = bench.enter(tokens=1)
        bench.at += 0.6
        place.first_token()
    for _ in range(8):
        bench.enter(tokens=22)
    assert 3 < bench.gate.wait_s() < 10, "at 1 token in 0.6 s it would be 106 s"


def test_what_waited_for_a_lost_engine_says_nothing_of_how_fast_it_is() -> None:
    bench = Bench(max_wait_s=5.0)
    places = [bench.enter() for _ in range(4)]
    bench.at, bench.losses = bench.at + 60.0, 1
    for place in places:
        place.first_token()
    assert bench.gate.rate == 0
    for _ in range(40):
        bench.enter()


def test_what_was_known_of_the_rate_is_forgotten() -> None:
    bench = Bench(max_wait_s=1.0)
    bench.serve([bench.enter(tokens=100) for _ in range(30)], tokens_per_s=1000)
    kept = [bench.enter(tokens=100) for _ in range(11)]
    assert bench.refused(tokens=100).reason == "predicted_wait"
    for place in kept:
        place.first_token()
    bench.at += 200
    for _ in range(50):
        bench.enter(tokens=100)


def test_an_engine_that_gives_nothing_fills_nothing() -> None:
    bench = Bench(max_wait_s=3.0)
    bench.enter()
    bench.at += 2.0
    bench.enter()
    bench.at += 1.5
    assert bench.refused().reason == "predicted_wait"


def test_a_deadline_that_cannot_be_met_is_refused_before_it_passes() -> None:
    bench = Bench()
    bench.serve([bench.enter(tokens=100) for _ in range(50)], tokens_per_s=1000)
    bench.enter(tokens=8000)
    bench.at += 0.6
    refused = bench.refused(slo=Slo(deadline_s=2.0))
    assert refused.reason == "deadline" and "its deadline is in 2 s" in str(refused)
    bench.enter(slo=Slo(deadline_s=30.0))
    bench.enter()


def test_background_work_waits_beside_the_queue() -> None:
    bench = Bench(queued_requests=1)
    bench.enter()
    for _ in range(5):
        bench.enter(caller=BATCH)
    assert bench.gate.waiting_requests == 1
    bench.draining = True
    assert bench.refused(caller=BATCH).status == 503


def test_draining_is_503_with_a_time_to_come_back() -> None:
    bench = Bench()
    bench.draining = True
    refused = bench.refused()
    assert (refused.status, refused.reason) == (503, "draining") and refused.retry_after_s > 0


def test_a_tenant_has_its_share_of_places_and_no_more() -> None:
    bench = Bench(tenant_requests=2)
    places = [bench.enter(), bench.enter()]
    assert bench.refused().reason == "tenant_requests"
    bench.enter(caller=BOB)
    places[0].first_token()
    assert bench.refused().reason == "tenant_requests", "it is still inside"
    places[0].leave()
    bench.enter()


def test_a_tenant_has_its_tokens_a_minute() -> None:
    bench = Bench(tenant_tokens_per_min=600)
    bench.enter(tokens=500).leave()
    refused = bench.refused(tokens=200)
    assert refused.reason == "tenant_tokens" and 9 < refused.retry_after_s < 11
    bench.enter(tokens=500, caller=BOB).leave()
    bench.at += refused.retry_after_s
    bench.enter(tokens=200).leave()
    assert bench.refused(tokens=10).retry_after_s <= 2
    bench.at += 120
    bench.enter(tokens=10_000).leave()  # more than a minute's: taken when all of it is there, and paid for afterwards
    bench.at += 60
    assert bench.refused(tokens=1).reason == "tenant_tokens"


def test_tenants_who_left_are_forgotten() -> None:
    bench = Bench(tenant_requests=2)
    for number in range(1000):
        bench.enter(caller=Caller("x", f"tenant-{number}")).leave()
    assert not bench.gate._tenants


def test_a_queue_of_ten_thousand_costs_no_more_than_one_of_ten() -> None:
    bench = Bench(queued_requests=20_000, queued_tokens=0, max_wait_s=0)
    places = [bench.enter() for _ in range(10_000)]
    bench.at += 1
    began = time.perf_counter()
    for place in places[5_000:6_000]:
        bench.enter()
        place.first_token()
        place.leave()
    assert (time.perf_counter() - began) / 1000 < 50e-6 * 4, "seconds an entry and a leave"


def test_one_tenant_does_not_fill_the_queue_where_others_come() -> None:
    bench = Bench(queued_requests=8)
    alone = [bench.enter() for _ in range(8)]
    assert bench.refused().reason == "queue_full"
    for place in alone:
        place.first_token()
    # Another one is seen, though it finds no room.
    bench.gate.look(BOB)
    places = [bench.enter() for _ in range(6)]
    assert bench.refused().reason == "tenant_queue"
    theirs = [bench.enter(caller=BOB) for _ in range(2)]
    assert bench.refused(caller=BOB).reason == "queue_full"
    for place in (*places, *theirs):
        place.leave()
    # After a minute without others the whole queue is there again.
    bench.at += 61.0
    assert len([bench.enter() for _ in range(8)]) == 8
    assert not bench.gate._waiting_of.keys() - {"alice"}
