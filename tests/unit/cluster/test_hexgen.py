"""The router of workflows with deadlines: its table, its budgets, and where it sends calls."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

import millstream
from millstream.cluster.fleet import Fleet
from millstream.cluster.protocol import Done, Member
from millstream.core import registry
from millstream.core.errors import ConfigError, RequestFault
from millstream.core.registry import Choice
from millstream.core.request import Program, Request, Slo, Tokens
from millstream.sched.predictors.linear import NAMES
from millstream.sched.profiles import Profile
from millstream.sim.replica import EngineSetting
from millstream.sim.simulate import Simulation
from millstream.sim.workload import Call

STEPS = ("link", "write", "repair", "repair", "test")
# Each token of a prompt takes 1 s on the speed-1 engine, and each token of an output 16 (nobody knows costs here).
LENGTHS = {"link": (10, 0), "write": (40, 0), "repair": (5, 0), "test": (5, 0)}


def fleet(speeds=(1.0, 1.0), **options):
    members = [Member(place, f"engine {place}", speed) for place, speed in enumerate(speeds)]
    return Fleet(registry.make("router", Choice("hexgen", options)), members)


def call(number, step, parents=(), slo_s=None, length=10, program="p", now=0.0):
    return Request(
        number,
        (Tokens(tuple(range(length))),),
        arrival=now,
        program=Program(program, number, stage=step, parents=parents),
        slo=Slo(e2e_s=slo_s),
    )


# -- budgets


def test_a_budget_is_the_steps_share_of_what_is_left():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    first, _ = books.send(call(1, "link", slo_s=130.0), 0.0)
    assert first.slo.e2e_s == pytest.approx(130 * 10 / (10 + 40 + 5 + 5 + 5))
    books.ended(1, Done(0), 30.0)
    second, _ = books.send(call(2, "write", (1,), now=30.0), 30.0)
    assert second.slo.e2e_s == pytest.approx((130 - 30) * 40 / (40 + 5 + 5 + 5))
    assert second.hints.expected_s == pytest.approx(40)


def test_calls_side_by_side_are_one_step_and_a_step_that_is_passed_takes_repairs_away():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    books.send(call(1, "link", slo_s=100.0), 0.0)
    one, _ = books.send(call(2, "write", (1,)), 0.0)
    other, _ = books.send(call(3, "write", (1,)), 0.0)
    assert one.slo == other.slo
    test, _ = books.send(call(4, "test", (2, 3), now=40.0), 40.0)
    assert test.slo.e2e_s == pytest.approx(60), "nothing is left to come, repairs neither"


def test_calls_that_say_nothing_of_what_they_waited_for_follow_each_other():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    books.send(call(1, "link", None, slo_s=100.0), 0.0)
    write, _ = books.send(call(2, "write", None), 0.0)
    assert write.slo.e2e_s == pytest.approx(100 * 40 / (40 + 5 + 5 + 5))
    test, _ = books.send(call(3, "test", None, now=40.0), 40.0)
    assert test.slo.e2e_s == pytest.approx(60)


def test_one_repair_more_than_the_template_has_leaves_the_rest_as_it_was():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    books.send(call(1, "write", slo_s=100.0), 0.0)
    shares = [books.send(call(n, "repair", (n - 1,)), 0.0)[0].slo.e2e_s for n in range(2, 6)]
    assert shares == pytest.approx([100 * 5 / 15, 50, 50, 50])


def test_a_workflow_that_is_late_has_next_to_nothing():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    books.send(call(1, "link", slo_s=10.0), 0.0)
    late, _ = books.send(call(2, "write", (1,), now=50.0), 50.0)
    assert 0 < late.slo.e2e_s < 0.001


def test_a_deadline_is_that_of_the_first_call_else_the_routers_else_there_is_none():
    books = fleet(steps=STEPS, lengths=LENGTHS, slo_s=65.0)
    assert books.send(call(1, "link"), 0.0)[0].slo.e2e_s == pytest.approx(10)
    assert books.send(call(2, "link", slo_s=130.0, program="q"), 0.0)[0].slo.e2e_s == pytest.approx(20)
    free, _ = fleet(lengths=LENGTHS).send(call(1, "link"), 0.0)
    assert free.slo.e2e_s is None and free.hints.expected_s == pytest.approx(10)


def test_what_follows_a_step_is_learned_from_workflows_that_have_ended():
    books = fleet(lengths=LENGTHS, slo_s=100.0)
    number, now = 0, 0.0
    for turn in range(4):
        before = ()
        for step in ("link", "write", *(["repair"] if turn % 2 else []), "test"):
            number += 1
            sent, _ = books.send(call(number, step, before, program=str(turn), now=now), now)
            if turn == 0:
                own = LENGTHS[step][0]
                assert sent.slo.e2e_s == pytest.approx(100 * own / own), "nothing is known of what comes"
            books.ended(number, Done(0), now)
            before = (number,)
        now += 10.0
    now += 10.0
    sent, _ = books.send(call(99, "write", program="new", now=now), now)
    assert sent.slo.e2e_s == pytest.approx(100 * 40 / (40 + 2.5 + 5)), "half of them had a repair"


def test_a_call_that_is_sent_again_is_the_same_step():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    books.send(call(1, "repair", slo_s=100.0), 0.0)
    (again,) = books.lost(books.place_of(1), 20.0)
    sent, _ = books.send(again, 20.0)
    # The engine counts from its arrival, 20 s ago; before it was a repair of two, and it is that still.
    assert sent.slo.e2e_s == pytest.approx(80 * 5 / 15 + 20)


def test_of_a_session_without_end_only_its_beginning_is_learned_from():
    books = fleet(slo_s=10.0, quiet_s=0.0)
    for n in range(1, 700):
        books.send(call(n, "talk", (n - 1,), now=float(n)), float(n))
        books.ended(n, Done(1), float(n))
    books.send(call(1000, "talk", program="next", now=2000.0), 2000.0)
    assert 0 < len(books.router._followed) <= 256


def test_two_tenants_may_call_their_workflows_alike():
    books = fleet(steps=STEPS, lengths=LENGTHS)
    books.send(replace(call(1, "link", slo_s=100.0), tenant="a"), 0.0)
    other, _ = books.send(replace(call(2, "link", slo_s=65.0, now=50.0), tenant="b"), 50.0)
    assert other.slo.e2e_s == pytest.approx(10)


# -- the table


def test_lengths_are_those_of_calls_that_have_ended_and_of_the_call_itself_before():
    router = registry.make("router", Choice("hexgen", {"start_output": 32}))
    books = Fleet(router, [Member(0, "engine", 1.0)])
    books.send(call(1, "write", length=20), 0.0)
    assert router.lengths("write") == (1.0, 32.0) and router.lengths("write", call(1, "write", length=20)) == (20, 32)
    books.send(call(2, "write", length=40), 0.0)
    books.ended(1, Done(6), 1.0)
    assert router.lengths("write") == (20, 6)
    books.ended(2, Done(2, whole=False), 1.0)
    assert router.lengths("write") == (20, 6), "it did not come to its end"
    books.send(call(3, "write", length=40), 1.0)
    books.ended(3, Done(10), 2.0)
    assert router.lengths("write") == (30, 8)


def test_where_costs_are_not_known_what_a_step_took_there_counts():
    router = registry.make("router", Choice("hexgen"))
    members = [Member(0, "fast", 1.0), Member(1, "slow", 1.0)]
    books = Fleet(router, members)
    for number, seconds in ((1, 2.0), (2, 6.0)):
        _, place = books.send(call(number, "write"), 0.0)
        books.ended(number, Done(5, service_s=seconds if place == 0 else 9.0), 1.0)
    assert router.seconds("write", members[0]) == pytest.approx(4.0)
    assert router.seconds("write", members[1]) != pytest.approx(4.0)
    books.lost(0, 2.0)
    assert router.seconds("write", members[0]) == router.seconds("write", members[1]), "another machine may come"


# -- dispatch


def test_alpha_one_goes_where_a_step_is_fastest_and_alpha_zero_where_least_waits():
    fast = fleet((1.0, 4.0), alpha=1.0, lengths=LENGTHS)
    assert [fast.send(call(n, "link", program=str(n)), 0.0)[1] for n in range(1, 7)] == [1] * 6
    even = fleet((1.0, 4.0), alpha=0.0, lengths=LENGTHS)
    places = [even.send(call(n, "link", program=str(n)), 0.0)[1] for n in range(1, 11)]
    assert places.count(1) == 8


def test_work_that_has_ended_counts_only_where_all_that_was_ever_sent_does():
    def third(**options):
        books = fleet((1.0, 1.0), alpha=0.0, lengths=LENGTHS, **options)
        books.send(call(1, "link", program="a"), 0.0)
        books.send(call(2, "repair", program="b"), 0.0)
        books.ended(1, Done(0), 1.0)
        return books.send(call(3, "link", program="c"), 1.0)[1]

    assert third(work="outstanding") == 0 and third(work="cumulative") == 1


def test_the_formula_is_the_papers():
    router = registry.make("router", Choice("hexgen", {"alpha": 0.4, "lengths": LENGTHS}))
    members = [Member(place, f"engine {place}", speed) for place, speed in enumerate((1.0, 2.0, 5.0))]
    books, draw = Fleet(router, members), random.Random(3)
    for number in range(1, 60):
        step = draw.choice(list(LENGTHS))
        base, base_work = router.seconds(step, members[0]), router.work_s(members[0])
        scores = [
            0.4 * base / router.seconds(step, one) - 0.6 * router.work_s(one) / (base_work or base) for one in members
        ]
        _, place = books.send(call(number, step, program=str(number)), 0.0)
        assert place == scores.index(max(scores))
        if draw.random() < 0.7:
            books.ended(draw.randint(1, number), Done(0), 0.0)


def test_in_turn_it_still_sets_budgets():
    books = fleet((1.0, 9.0), dispatch="turns", lengths=LENGTHS, slo_s=50.0)
    sent = [books.send(call(n, "link", program=str(n)), 0.0) for n in range(1, 5)]
    assert [place for _, place in sent] == [0, 1, 0, 1] and all(one.slo.e2e_s == 50 for one, _ in sent)


def test_all_of_its_books_empty_and_engines_that_are_lost_get_nothing():
    books = fleet((1.0, 2.0), lengths=LENGTHS, quiet_s=0.0, slo_s=10.0)
    for n in range(1, 30):
        books.send(call(n, "link", program=str(n % 5)), float(n))
    for request in books.lost(1, 31.0):
        assert books.send(request, 31.0)[1] == 0
    for n in range(1, 30):
        books.ended(n, Done(1), 40.0)
    router = books.router
    assert [router.work_s(member) for member in books.members] == [0, 0]
    books.send(call(99, "link", program="last"), 100.0)
    assert len(router._workflows) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"alpha": "much"},
        {"slo_s": 0.0},
        {"work": "all"},
        {"dispatch": "random"},
        {"steps": "link"},
        {"lengths": {"link": (1,)}},
        {"rows": 0},
        {"quiet_s": -1},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        registry.make("router", Choice("hexgen", options))


# -- traps: it must not know what nobody can, and be plain where there is nothing to decide


def engine(**changes):
    state = {"coefficients": dict(zip(NAMES, (5e-3, 1e-4, 1e-7, 0.0, 0.0, 1e-3, 2e-4), strict=True)), "residual": 0.0}
    given = {"blocks": 400, "block_size": 16, "step_tokens": 256, "max_rows": 4, "max_context": 4096, **changes}
    return Profile("toy", "toy", "none", "made up", "linear", state, **given)


def calls(count=80, seed=0, stages=("",)):
    draw, at, out = random.Random(seed), 0.0, []
    for number in range(1, count + 1):
        at += draw.expovariate(40.0)
        start, stage = number << 20, draw.choice(stages)
        session = f"s{number % 7}" if stage else ""
        out.append(
            Call(
                number,
                at,
                tuple(range(start, start + 120)),
                draw.randint(2, 60),
                session=session,
                stage=stage,
                slo=Slo(e2e_s=2.0),
            )
        )
    return out


def run(found, router, policy, engines=3, **given):
    setting = EngineSetting((Choice(policy),), prefix=Choice("none"))
    replicas = [(f"engine {place}", engine()) for place in range(engines)]
    return Simulation(found, replicas, setting, registry.make("router", router), **given).run()


@pytest.mark.parametrize("engines", [1, 3])
def test_one_class_of_engines_and_calls_is_least_work_and_fcfs_exactly(engines):
    found = calls()
    plain = run(found, "least-work", "fcfs", engines)
    hexgen = run(found, Choice("hexgen", {"lengths": {"": (120, 30)}}), "urgency", engines)
    assert hexgen.fingerprint == plain.fingerprint
    assert len({one.replica for one in plain.served}) == engines


def test_the_same_calls_of_many_steps_are_not_served_alike():
    found = calls(stages=("link", "write", "test"))
    hexgen = run(found, Choice("hexgen", {"lengths": {"link": (9, 1), "write": (120, 60)}}), "urgency")
    assert hexgen.fingerprint != run(found, "least-work", "fcfs").fingerprint


def test_it_decides_the_same_whether_or_not_true_lengths_could_be_asked_for():
    found = calls(stages=("link", "write", "test"))
    assert run(found, "hexgen", "urgency").fingerprint == run(found, "hexgen", "urgency", oracle=True).fingerprint


def test_a_router_that_reads_a_true_length_fails_outside_of_an_oracle_arm():
    from millstream.reproduce.hexgen_text2sql import Clairvoyant

    found = [replace(one, session=f"s{one.id}") for one in calls(20)]
    tails = dict.fromkeys(range(1, 21), 0.0)
    setting = EngineSetting((Choice("urgency"),))
    with pytest.raises(RequestFault, match="oracle"):
        Simulation(found, [("engine", engine())], setting, Clairvoyant(tails)).run()
    known = Simulation(found, [("engine", engine())], setting, Clairvoyant(tails), oracle=True).run()
    assert all(one.finish == "stop" for one in known.served)


def test_nothing_that_plugs_in_speaks_of_the_oracle():
    root = Path(millstream.__file__).parent
    for path in ("cluster/routers/hexgen.py", "sched/policies/urgency.py"):
        assert "oracle" not in (root / path).read_text()


def test_names_of_steps_that_clients_make_up_take_no_room(monkeypatch):
    monkeypatch.setattr("millstream.cluster.routers.hexgen.MOST_STEPS", 4)
    books = fleet(lengths={"write": (40, 0)})
    for number in range(40):
        books.send(call(number, f"made up {number}", program=f"p{number}"), float(number))
        books.ended(number, Done(3), number + 0.5)
    books.send(call(50, "write", program="q"), 50.0)
    books.ended(50, Done(0), 51.0)
    router = books.router
    tables = (router._seen, router._took, router._priced, router._followed, *router._outstanding.values())
    named = {key if isinstance(key, str) else key[0] for table in tables for key in table}
    assert named <= {"", "write", "made up 0", "made up 1"} and "write" in named


# -- beyond the paper


def test_a_table_of_calls_goes_by_the_prompt_that_is_there():
    lengths = {"write": (40, 0)}
    for table, seconds in (("step", 40), ("call", 100)):
        books = fleet(lengths=lengths, table=table)
        sent, _ = books.send(call(1, "write", length=100), 0.0)
        assert sent.hints.expected_s == pytest.approx(seconds)
    books = fleet(alpha=0.0, lengths=lengths, table="call")
    places = [books.send(call(n, "write", program=f"p{n}", length=length), 0.0)[1] for n, length in ((1, 90), (2, 30))]
    places += [books.send(call(n, "write", program=f"p{n}", length=30), 0.0)[1] for n in (3, 4, 5)]
    assert places == [0, 1, 1, 1, 0], "three short ones come to as much as one long one"
    books.ended(1, Done(0), 5.0)
    assert books.router.work_s(books.members[0]) == pytest.approx(30)


def test_occupied_time_is_the_prompt_and_a_share_of_what_is_decoded():
    # 16 s a token of an output: 10 + 16 at once, the other 8 tokens shared by eight.
    for work, seconds in (("outstanding", 10 + 16 * 9), ("occupied", 10 + 16 + 16 * 8 / 8)):
        books = fleet(lengths={"write": (10, 9)}, work=work)
        sent, place = books.send(call(1, "write"), 0.0)
        assert books.router.work_s(books.members[place]) == pytest.approx(seconds)
        assert sent.hints.expected_s == pytest.approx(10 + 16 * 9), "how long it takes is the same"
