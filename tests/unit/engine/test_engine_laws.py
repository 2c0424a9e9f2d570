"""What the engine promises of single requests: endings, counts, times, events, faults, and the steps it makes."""

from __future__ import annotations

import pytest
from harness import EOS, VOCAB, Bench

from millstream.core.cache import CacheGroup, Keep
from millstream.core.errors import BadRequest, UnknownName
from millstream.core.events import Admitted, Computed, Emitted, Finished, Preempted, Prefilled, Stepped, Submitted
from millstream.core.plan import SampleAsk
from millstream.core.registry import Choice
from millstream.core.request import Kind, SamplingParams
from millstream.core.sequence import Finish
from millstream.decode.observers.stop_strings import StopStrings
from millstream.runner.null_runner import choose, prefix_hash
from millstream.sched.protocol import Policy
from millstream.sched.stack import PolicyStack
from millstream.text.vocabulary import Vocabulary

SPLITFUSE = (Choice("splitfuse", {"budget": 8}), "seats", "kv-blocks")


def last(bench, request, index=0):
    return bench.chunks[(request.id, index)][-1]


# -- endings


def test_a_stop_token_ends_an_output_and_is_part_of_it():
    bench = Bench()
    free = bench.add([1, 2, 3], 8)
    bench.run()
    token = bench.output(free)[3]
    request = bench.add([1, 2, 3], 8, params={"stop_token_ids": (token,)})
    bench.run()
    assert bench.output(request) == bench.output(free)[: bench.output(free).index(token) + 1]
    assert (last(bench, request).finish, last(bench, request).stop_reason) == (Finish.STOP, token)


@pytest.mark.parametrize("plans", [1, 2])
def test_the_models_own_end_token_ends_an_output_unless_it_is_ignored(plans):
    probe = Bench()
    free = probe.add([4, 4], 8)
    probe.run()
    end = probe.output(free)[2]
    bench = Bench(plans=plans, stop_ids=frozenset({end}))
    ends, goes_on = bench.add([4, 4], 8), bench.add([4, 4], 8, params={"ignore_eos": True})
    bench.run()
    assert bench.output(ends) == probe.output(free)[: probe.output(free).index(end) + 1]
    assert (last(bench, ends).finish, last(bench, ends).stop_reason) == (Finish.STOP, None)
    assert bench.output(goes_on) == probe.output(free) and bench.finish(goes_on) is Finish.LENGTH
    bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
def test_min_tokens_bans_stop_tokens_until_so_many_were_made(plans):
    stop = frozenset(range(10, VOCAB))
    bench = Bench(plans=plans, stop_ids=stop)
    request = bench.add([1, 2], 9, params={"min_tokens": 4})
    bench.run()
    tokens, want = [1, 2], []
    for count in range(9):
        banned = tuple(sorted(stop)) if count < 4 else ()
        ask = SampleAsk(SamplingParams(temperature=0.0), 0, 0, len(tokens), 2, banned=banned)
        want.append(choose(ask, prefix_hash(tokens), VOCAB))
        tokens.append(want[-1])
        if want[-1] in stop and count >= 4:
            break
    assert bench.output(request) == want
    assert not set(want[:4]) & stop


def test_the_context_ends_what_max_tokens_does_not():
    bench = Bench(context=12)
    request = bench.add([1, 2, 3, 4], max_tokens=8)
    bench.run()
    unbounded = Bench(context=12)
    open_ended = unbounded.add([1, 2, 3, 4], params={"max_tokens": None})
    unbounded.run()
    assert len(bench.output(request)) == 8
    assert unbounded.output(open_ended) == bench.output(request)
    assert unbounded.finish(open_ended) is Finish.LENGTH


def test_all_that_the_cache_holds_ends_an_open_ended_output():
    bench = Bench(num_blocks=3)
    request = bench.add([1, 2, 3, 4], params={"max_tokens": None})
    bench.run()
    # The last token of all needs no slot.
    assert len(bench.output(request)) == 3 * 4 - 4 + 1 and bench.finish(request) is Finish.LENGTH


@pytest.mark.parametrize("plans", [1, 2])
def test_a_stop_string_ends_an_output_wherever_tokens_cut_it(plans):
    vocabulary = Vocabulary.from_bytes([b"<%d>" % i for i in range(VOCAB)])

    def observers(request):
        return [StopStrings(request, vocabulary)] if StopStrings.wanted(request) else []

    bench = Bench(plans=plans, observers=observers)
    free = bench.add([9, 8], 8)
    bench.run()
    tokens = bench.output(free)
    # From inside the third token to inside the fourth.
    stop = f"{tokens[2]}><{str(tokens[3])[0]}"
    request = bench.add([9, 8], 8, params={"stop": (stop, "nothing like it")})
    bench.run()
    assert bench.output(request) == tokens[:4]
    assert (last(bench, request).finish, last(bench, request).stop_reason) == (Finish.STOP, stop)
    bench.clean()


def test_an_observer_that_fails_ends_its_own_request_only():
    class Broken:
        def see(self, tokens):
            raise KeyError("broken")

    bench = Bench(observers=lambda request: [Broken()] if request.id == 0 else [])
    bad, good = bench.add([1, 2]), bench.add([3, 4])
    bench.run()
    assert last(bench, bad).finish is Finish.ERROR and "KeyError" in last(bench, bad).error
    assert bench.output(good) == bench.truth(good)
    bench.clean()


# -- faults


class Picky:
    """A policy, a meter or a decode method that fails for the sequences of one tenant, in the call it is told."""

    def __init__(self, inner, call):
        self.inner, self.call = inner, call

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        if name != self.call:
            return found

        def fails(seq, *rest):
            if getattr(seq, "tenant", None) == "bad" or getattr(seq, "request", seq).tenant == "bad":
                raise ZeroDivisionError(f"{name} is broken")
            return found(seq, *rest)

        return fails


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("call", ["rank", "admit", "fit", "take", "want", "ask"])
def test_what_fails_while_a_plan_is_made_ends_the_request_it_was_made_for(call, plans):
    bench = Bench(plans=plans, num_blocks=9, preemption="swap", host_blocks=5)
    scheduler = bench.engine.scheduler
    if call in ("rank", "admit"):
        scheduler.policy = Picky(scheduler.policy, call)
    elif call in ("fit", "take"):
        scheduler.meters[0] = Picky(scheduler.meters[0], call)
    good = [bench.add([3, 4], 12), bench.add([1, 2, 3, 4, 5, 6, 7, 8, 9], 12)]
    bad = [bench.add([1, 2], tenant="bad"), bench.add([1, 2, 9], params={"n": 3}, tenant="bad")]
    for seq in scheduler.live.values():
        if seq.request.tenant == "bad" and call in ("want", "ask"):
            seq.method = Picky(seq.method, call)
    bench.run()
    for request in bad:
        for index in range(request.params.n):
            assert last(bench, request, index).finish is Finish.ERROR
            assert f"{call} is broken" in last(bench, request, index).error
    for request in good:
        assert bench.output(request) == bench.truth(request)
    bench.clean()


def test_a_policy_that_cannot_follow_events_is_told_of_once_and_goes_on(caplog):
    bench = Bench(policies=("fcfs",))

    class Deaf(Policy):
        def rank(self, seq, view):
            return (seq.arrival,)

        def observe(self, event):
            raise RuntimeError("deaf")

    bench.engine.scheduler.policy = PolicyStack([Deaf()])
    request = bench.add([1, 2])
    bench.run()
    assert bench.output(request) == bench.truth(request)
    assert [record.message.count("Deaf") for record in caplog.records] == [1]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("plans", [1, 2])
def test_a_fault_ends_one_row_and_the_step_goes_on_for_the_rest(plans, preemption):
    bench = Bench(plans=plans, preemption=preemption, num_blocks=9, host_blocks=5, fail={47: "a bad row"})
    bad = bench.add([1, 2, 3, 4, 5, 6, 47, 7, 8, 9, 10], 5)
    group = bench.add([1, 2, 47, 5], 5, params={"n": 3})
    beams = bench.add([8, 47], 5, decode=Choice("beam", {"width": 2}))
    good = [bench.add([n, n + 1, n + 2, 30], 3) for n in range(6)]
    bench.run(2000)
    for request, count in ((bad, 1), (group, 3), (beams, 2)):
        for index in range(count):
            assert last(bench, request, index).finish is Finish.ERROR
            assert last(bench, request, index).error == "a bad row"
    for request in good:
        if 47 not in bench.truth(request):
            assert bench.output(request) == bench.truth(request)
    assert any(47 not in bench.truth(request) for request in good)
    bench.clean()


@pytest.mark.parametrize("plans", [1, 2])
def test_a_fault_in_one_beam_ends_its_search_and_frees_everything(plans):
    for fatal in range(VOCAB):
        bench = Bench(plans=plans, fail={fatal: "a bad row"})
        beams = bench.add([50 - 1, 7], 5, decode=Choice("beam", {"width": 3}))
        bench.run(200)
        ends = {last(bench, beams, index).finish for index in range(3)}
        assert ends in ({Finish.LENGTH}, {Finish.ERROR})
        bench.clean()


def test_what_can_never_be_served_is_refused_and_leaves_nothing_behind():
    bench = Bench(num_blocks=4, context=40)
    for prompt, given, param in (
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        (list(range(17)), {}, "prompt"),
        (list(range(40)), {}, "prompt"),
        ([1], {"max_tokens": 40}, "max_tokens"),
        ([1], {"params": {"stop_token_ids": (VOCAB,)}}, "stop_token_ids"),
        ([1], {"params": {"logit_bias": {VOCAB: 1.0}}}, "logit_bias"),
        ([1], {"kind": Kind.EMBED}, "kind"),
        ([1], {"adapter": "mine"}, "adapter"),
    ):
        with pytest.raises(BadRequest) as caught:
            bench.add(prompt, **given)
        assert caught.value.param == param
        bench.requests.clear()
    with pytest.raises(UnknownName, match="beam"):
        bench.add([1], decode=Choice("beams"))
    assert not bench.engine.busy
    bench.clean()


def test_an_id_that_is_inside_already_is_refused():
    bench = Bench()
    request = bench.add([1, 2])
    with pytest.raises(BadRequest, match="id"):
        bench.engine.submit(request, lambda chunk: None)
    bench.run()
    assert bench.output(request) == bench.truth(request)


def test_a_failed_runner_ends_everything_inside_with_an_error():
    bench = Bench()
    requests = [bench.add([1, n], 5, params={"n": 2}) for n in range(3)]
    bench.step()
    bench.engine.fail(RuntimeError("no power"))
    assert not bench.engine.busy
    for request in requests:
        for index in range(2):
            assert (
                last(bench, request, index).finish is Finish.ERROR and "no power" in last(bench, request, index).error
            )
    bench.clean()


# -- counts, times, events


def test_usage_and_metrics_count_what_happened():
    bench = Bench(meters=(Choice("splitfuse", {"budget": 4}), Choice("seats", {"max_rows": 1}), "kv-blocks"))
    first, second = bench.add([1] * 8, 3), bench.add([2] * 4, 2)
    bench.run()
    # One second a step: 8 tokens take two steps of 4, then two more tokens one each; the second waits for its seat.
    metrics = last(bench, first).metrics
    assert (metrics.queue_s, metrics.ttft_s, metrics.total_s) == (1.0, 2.0, 4.0)
    assert last(bench, second).metrics.queue_s == 5.0 and last(bench, second).metrics.ttft_s == 5.0
    usage = last(bench, second).usage
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (4, 2, 0)
    assert bench.engine.max_running == 1


def test_cached_tokens_say_what_the_prefix_cache_held():
    bench = Bench()
    prompt = list(range(18))
    requests = []
    for given in ({}, {}, {"cache_salt": "another tenant"}):
        requests.append(bench.add(prompt, 2, **given))
        bench.run()
    assert [last(bench, request).usage.cached_tokens for request in requests] == [0, 17, 0]
    cold = Bench(prefix="none")
    for _ in range(2):
        request = cold.add(prompt, 2)
        cold.run()
    assert last(cold, request).usage.cached_tokens == 0


def test_events_tell_each_request_in_order_and_every_token_once():
    bench = Bench(num_blocks=6, meters=SPLITFUSE, plans=2)
    told = []
    bench.engine.listeners.append(lambda event: told.append((event, getattr(event, "seq", None) and event.seq.id)))
    for n in range(5):
        bench.add([n, *range(7)], 10)
    bench.run()
    assert any(isinstance(event, Preempted) for event, _ in told)
    for seq in range(5):
        own = [event for event, seq_id in told if seq_id == seq]
        kinds = [type(event) for event in own]
        assert kinds[0] is Submitted and kinds[-1] is Finished
        assert kinds.count(Submitted) == kinds.count(Admitted) == kinds.count(Finished) == 1
        assert kinds.index(Admitted) < kinds.index(Prefilled) < kinds.index(Emitted)
        # A kind of Computed, for chunks; a token at a time is Computed and no more.
        assert all(
            (kind is Prefilled) == (event.tokens > 1 or event.start < 8)
            for event, kind in zip(own, kinds, strict=True)
            if isinstance(event, Computed)
        )
        assert sum(event.tokens for event in own if isinstance(event, Emitted)) == 10
        assert [event.now for event in own] == sorted(event.now for event in own)
    steps = [event for event, _ in told if isinstance(event, Stepped)]
    assert len(steps) == bench.engine.num_steps == bench.runner.steps
    assert [step.plan for step in steps] == sorted(step.plan for step in steps)
    assert all(0 <= step.prompt_tokens <= step.tokens <= 8 for step in steps)
    computed = sum(event.tokens for event, _ in told if isinstance(event, Computed))
    assert computed <= sum(step.tokens for step in steps)


# -- prompt logprobs and scoring


def check_scores(bench, request, index=0):
    found = next(c.prompt_logprobs for c in bench.chunks[(request.id, index)] if c.prompt_logprobs is not None)
    assert found[0] is None
    assert [(e.chosen.token, e.chosen.logprob) for e in found[1:]] == [
        (t, -float(t % 7)) for t in request.prompt_ids[1:]
    ]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("budget", [1, 3, 64])
@pytest.mark.parametrize("plans", [1, 2])
def test_every_prompt_position_is_scored_once_however_it_is_chunked_or_preempted(plans, budget, preemption):
    meters = (Choice("splitfuse", {"budget": budget}), "seats", "kv-blocks")
    bench = Bench(plans=plans, num_blocks=8, host_blocks=6, meters=meters, preemption=preemption)
    warm = bench.add(range(12), 2)
    bench.run()
    assert last(bench, warm).prompt_logprobs is None
    scored = [bench.add([*range(12), n], 1, kind=Kind.SCORE, params={"prompt_logprobs": 2}) for n in range(3)]
    both = [bench.add([*range(11), n, 3], 5, params={"prompt_logprobs": 0}) for n in range(3)]
    bench.run(2000)
    for request in scored:
        check_scores(bench, request)
        assert bench.output(request) == [] and bench.finish(request) is Finish.STOP
    for request in both:
        check_scores(bench, request)
        assert bench.output(request) == bench.truth(request)
    bench.clean()


def test_every_output_of_a_request_gets_the_prompt_logprobs():
    bench = Bench()
    request = bench.add([5, 6, 7], 3, params={"n": 3, "prompt_logprobs": 0})
    beams = bench.add([5, 6, 8], 3, params={"prompt_logprobs": 0}, decode=Choice("beam", {"width": 2}))
    bench.run()
    for index in range(3):
        check_scores(bench, request, index)
    check_scores(bench, beams, 0)


def test_one_token_has_nothing_before_it_to_be_scored_by():
    bench = Bench()
    score = bench.add([5], 1, kind=Kind.SCORE, params={"prompt_logprobs": 0})
    generate = bench.add([5], 2, params={"prompt_logprobs": 0})
    bench.run()
    assert last(bench, score).prompt_logprobs == (None,)
    assert bench.chunks[(generate.id, 0)][0].prompt_logprobs == (None,)


# -- sharing


@pytest.mark.parametrize("prefix", ["none", "radix"])
@pytest.mark.parametrize("plans", [1, 2])
def test_outputs_of_one_request_share_the_blocks_of_its_prompt(plans, prefix):
    bench = Bench(plans=plans, prefix=prefix, num_blocks=24)
    request = bench.add(range(17), 4, params={"n": 4, "temperature": 1.0, "seed": 3})
    most = 0
    while bench.engine.busy:
        bench.step()
        most = max(most, bench.ledger.stats()["used_blocks"])
    # Four whole blocks of prompt once; each output then has at most two of its own (positions 16 to 20).
    assert most <= 4 + 4 * 2
    assert [bench.output(request, index) for index in range(4)] == [bench.truth(request, index) for index in range(4)]
    assert len({tuple(bench.output(request, index)) for index in range(4)}) > 1
    usages = [last(bench, request, index).usage for index in range(4)]
    assert [usage.cached_tokens for usage in usages] == [0, 16, 16, 16]
    bench.clean()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("plans", [1, 2])
def test_outputs_that_share_a_prompt_survive_few_blocks_and_windows(plans, preemption):
    for num_blocks in range(6, 14):
        groups = (CacheGroup("full"), CacheGroup("window", Keep.WINDOW, 5))
        bench = Bench(plans=plans, groups=groups, num_blocks=num_blocks, preemption=preemption, host_blocks=4)
        requests = [bench.add([*range(9), n], 7, params={"n": 3, "temperature": 1.0, "seed": n}) for n in range(3)]
        bench.run(2000)
        for request in requests:
            for index in range(3):
                assert bench.output(request, index) == bench.truth(request, index)
        bench.clean()


# -- progress


@pytest.mark.parametrize("policies", [("fcfs",), ("shortest-remaining",), ("prefill-first", "fcfs")])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("plans", [1, 2])
def test_a_handful_of_blocks_makes_progress_within_bounds(plans, preemption, policies):
    for num_blocks in (4, 5, 7):
        bench = Bench(
            plans=plans, num_blocks=num_blocks, host_blocks=2, preemption=preemption, policies=policies, context=16
        )
        requests = [bench.add([n, *range(n % 7)], 8) for n in range(8)]
        steps = bench.run(1500)
        work = sum(request.num_prompt + 8 for request in requests)
        preemptions = sum(last(bench, request).metrics.preemptions for request in requests)
        # One sequence at a time would take a step for each token: preemption may cost, not multiply.
        assert steps <= 2 * work and preemptions <= work
        for request in requests:
            assert bench.output(request) == bench.truth(request)
        bench.clean()


def test_a_host_too_small_to_swap_to_falls_back_to_recompute():
    bench = Bench(num_blocks=6, preemption="swap", host_blocks=2)
    how = set()
    bench.engine.listeners.append(lambda event: how.add(event.how) if isinstance(event, Preempted) else None)
    requests = [bench.add([n, 1, 2, 3, 4, 5], 10) for n in range(4)]
    bench.run(2000)
    assert how == {"swap", "recompute"}
    for request in requests:
        assert bench.output(request) == bench.truth(request)
    bench.clean()


def test_the_watermark_keeps_newcomers_out_while_others_run():
    meters = (Choice("splitfuse", {"budget": 64}), "seats", Choice("kv-blocks", {"watermark": 0.5}))
    bench = Bench(num_blocks=10, meters=meters, prefix="none")
    bench.add(range(12), 4)
    bench.add(range(12, 24), 4)
    bench.step()
    # 3 of 10 blocks are taken; 3 more would leave 4, less than half.
    assert bench.engine.scheduler.num_running == 1 and bench.engine.scheduler.num_waiting == 1
    bench.run()
    bench.clean()


def test_nobody_overtakes_a_sequence_that_waits_for_blocks():
    bench = Bench(num_blocks=8, prefix="none", meters=(Choice("splitfuse", {"budget": 64}), "seats", "kv-blocks"))
    order = []
    bench.engine.listeners.append(lambda e: order.append(e.seq.request_id) if isinstance(e, Admitted) else None)
    bench.add(range(20), 6)
    bench.step()
    for prompt in (range(24), [1], [2]):
        bench.clock.advance(0.1)
        bench.add(prompt, 3)
    bench.run()
    assert order == [0, 1, 2, 3]


# -- step composition


def watch(bench):
    """Each plan's rows as (sequence, number of tokens)."""
    plans = []
    launch = bench.runner.launch

    def spy(plan):
        plans.append([(extend.seq, len(extend.tokens), extend.sample is not None) for extend in plan.extends])
        return launch(plan)

    bench.runner.launch = spy
    return plans


@pytest.mark.parametrize("policies", [("fcfs",), ("shortest-remaining",), ("prefill-first", "fcfs")])
@pytest.mark.parametrize("plans", [1, 2])
def test_splitfuse_fills_its_budget_and_serves_every_running_decode(plans, policies):
    bench = Bench(plans=plans, num_blocks=80, meters=SPLITFUSE, policies=policies, prefix="none")
    steps = watch(bench)
    for n in range(6):
        bench.add([n] * (5 + 3 * n), 9)
    total = sum(5 + 3 * n for n in range(6))
    decoding: set[int] = set()
    prefilled = 0
    while bench.engine.busy:
        seen = len(steps)
        bench.step()
        for rows in steps[seen:]:
            tokens = sum(count for _, count, _ in rows)
            assert tokens <= 8
            if prefilled + 8 < total:
                assert tokens == 8, "prompts wait, so the step is full"
                if plans == 1:
                    served = {seq for seq, _, _ in rows}
                    running = {seq.id for seq in bench.engine.scheduler.live.values()} & decoding
                    assert running <= served or tokens == len(rows)
            prefilled += sum(count for seq, count, _ in rows if seq not in decoding)
            decoding |= {seq for seq, _, samples in rows if samples}
    for request in bench.requests.values():
        assert bench.output(request) == bench.truth(request)


def test_orca_computes_prompts_whole_beside_decodes():
    bench = Bench(num_blocks=80, meters=("orca", "seats", "kv-blocks"), prefix="none")
    steps = watch(bench)
    bench.add(range(5), 8)
    bench.step()
    bench.add(range(20), 4)
    bench.run()
    assert steps[0] == [(0, 5, True)] and sorted(steps[1]) == [(0, 1, True), (1, 20, True)]


def test_orca_bounds_the_prompt_tokens_of_a_step_and_lets_a_longer_one_through_alone():
    bench = Bench(num_blocks=80, meters=(Choice("orca", {"max_tokens": 10}), "seats", "kv-blocks"), prefix="none")
    steps = watch(bench)
    for length in (20, 6, 4, 4):
        bench.add(range(length), 2)
    bench.run()
    prompts = [[count for _, count, _ in rows if count > 1] for rows in steps]
    assert [counts for counts in prompts if counts] == [[20], [6, 4], [4]]


def test_prefill_first_never_puts_prompts_beside_decodes():
    meters = (Choice("prefill-first", {"max_tokens": 12}), "seats", "kv-blocks")
    bench = Bench(num_blocks=80, meters=meters, policies=("prefill-first", "fcfs"), prefix="none")
    steps = watch(bench)
    bench.add(range(5), 8)
    bench.step()
    bench.step()
    for length in (9, 3, 7):
        bench.add(range(length), 4)
    bench.run()
    assert all(len({count > 1 for _, count, _ in rows}) == 1 for rows in steps)
    prompts = [[count for _, count, _ in rows] for rows in steps if rows[0][1] > 1]
    assert prompts == [[5], [9, 3], [7]]
    for request in bench.requests.values():
        assert bench.output(request) == bench.truth(request)


def test_the_end_token_of_the_harness_is_in_its_vocabulary():
    assert 0 <= EOS < VOCAB


def test_who_listens_from_some_time_on_hears_of_rows_from_then_on():
    bench = Bench()
    bench.engine.listeners.clear()
    request = bench.add([1, 2, 3], 6)
    for _ in range(3):
        bench.step()
    heard = []
    bench.engine.listeners.append(heard.append)
    bench.run()
    kinds = [type(event) for event in heard]
    assert kinds.count(Emitted) == 3 and kinds.count(Stepped) == 3 and kinds[-1] is Stepped
    assert bench.output(request) == bench.truth(request)
