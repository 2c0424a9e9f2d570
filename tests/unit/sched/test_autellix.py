"""The policy that counts what whole programs were served."""

from __future__ import annotations

from harness import Bench

from millstream.core.registry import Choice
from millstream.core.request import Program

# The paper's figure: calls of four programs, in steps, one after the other; two places.
GANTT = {"A": [4, 3, 1, 1], "B": [3, 3, 4], "C": [1, 2], "D": [4]}


def played(policy, programs=GANTT, seats=2):
    """Steps that each program waited over all its calls."""
    bench = Bench(
        policies=(policy,),
        meters=(Choice("splitfuse", {"budget": 64}), Choice("seats", {"max_rows": seats}), "kv-blocks"),
        num_blocks=200,
    )
    step_s = 1.0
    launch = bench.runner.collect
    bench.runner.collect = lambda ticket: _timed(launch(ticket), step_s)
    left = {name: list(calls) for name, calls in programs.items()}
    made, waits = {}, dict.fromkeys(programs, 0.0)

    def call(name):
        steps = left[name].pop(0)
        request = bench.add([ord(name) % 50], steps, program=Program(name, len(left[name])))
        made[request.id] = (name, steps, bench.clock.now())

    for name in programs:
        call(name)
    for _ in range(200):
        if not bench.engine.busy:
            break
        bench.step()
        for number, (name, steps, at) in list(made.items()):
            chunks = bench.chunks.get((number, 0))
            if chunks and chunks[-1].finish is not None:
                del made[number]
                waits[name] += bench.clock.now() - at - steps
                if left[name]:
                    call(name)
    assert not made
    bench.clean()
    return waits


def _timed(result, seconds):
    return type(result)(result.plan, seconds, result.settled)


FINE = {"count": "plas", "quantum_s": 1.0, "ratio": 1.0, "levels": 100, "starving": 0, "every": 1}


def test_the_papers_four_programs_wait_18_steps_first_come_first_served_and_12_by_their_service():
    assert sum(played("fcfs").values()) == 18
    assert sum(played(Choice("autellix", FINE)).values()) == 12
    # Where no call takes another's place, what a program was served counts only between its calls.
    assert sum(played(Choice("autellix", {**FINE, "every": 1000})).values()) == 14


def test_a_call_of_a_long_program_waits_behind_one_of_a_program_that_is_new():
    bench, _ = engine({"every": 1000})
    for number in range(3):
        bench.add([1], 5, program=Program("long", number))
        bench.run()
    old = bench.add([2], 5, program=Program("long", 3))
    new = bench.add([3], 5, program=Program("new", 0))
    bench.run()
    assert bench.first_token_at(new) < bench.first_token_at(old)


def test_who_fans_out_is_counted_by_its_longest_path_or_by_all_of_it():
    for count, service in (("atlas", 6.0), ("plas", 18.0)):
        bench, policy = engine({"count": count}, seats=8)
        for number in range(3):
            bench.add([number], 6, program=Program("tree", number, thread=number))
        bench.run()
        late = bench.add([9], 1, program=Program("tree", 9))
        assert policy._calls[bench.engine._groups[late.id].seqs[0].id].inherited == service
        bench.run()


def test_what_a_program_was_served_elsewhere_comes_with_its_calls():
    bench, _ = engine({"every": 1000})
    busy = bench.add([1], 5)
    bench.step()
    elsewhere = bench.add([2], 5, program=Program("p", 4, service_s=50.0))
    fresh = bench.add([3], 5)
    bench.run()
    assert bench.first_token_at(busy) < bench.first_token_at(fresh) < bench.first_token_at(elsewhere)


def test_a_long_program_does_not_starve_beside_a_stream_of_short_ones():
    def waited(starving):
        bench, _ = engine({"starving": starving, "every": 1})
        for number in range(4):
            bench.add([1], 5, program=Program("long", number))
            bench.run()
        last = bench.add([2], 5, program=Program("long", 4))
        for number in range(300):
            bench.add([number % 50], 2)
            bench.step()
            bench.step()
            if bench.chunks.get((last.id, 0)) and bench.finish(last) is not None:
                break
        took = bench.clock.now() - last.arrival
        bench.run()
        return took

    assert waited(2.0) < 200 and waited(0) > 500


def test_calls_that_are_aborted_count_for_what_was_done_of_them_and_nothing_stays_behind():
    bench, policy = engine({})
    for number in range(6):
        bench.add([number], 30, program=Program(f"p{number % 2}", number), params={"n": 1 + number % 2, "seed": 1})
    for _ in range(7):
        bench.step()
    for request in list(bench.requests.values()):
        bench.engine.abort(request.id)
    bench.run()
    assert not policy._calls and not policy._waiting and not policy._programs
    assert sum(program.worked for program in policy._idle.values()) > 0
    bench.clean()


def engine(options, seats=1):
    bench = Bench(
        policies=(Choice("autellix", {"quantum_s": 2.0, **options}),),
        meters=(Choice("splitfuse", {"budget": 64}), Choice("seats", {"max_rows": seats}), "kv-blocks"),
        num_blocks=200,
    )
    collect = bench.runner.collect
    bench.runner.collect = lambda ticket: _timed(collect(ticket), 1.0)
    return bench, bench.engine.scheduler.policy.policies[0]
