"""The loop: plan, launch, collect, settle. It knows requests and sequences, and nothing of tensors."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import traceback
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from millstream.core import registry
from millstream.core.client import Chunk, Load, RequestMetrics, Usage
from millstream.core.clock import Clock
from millstream.core.errors import BadRequest, EngineClosed, MillstreamError
from millstream.core.events import Computed, Emitted, Event, Finished, Preempted, Prefilled, Stepped, Submitted
from millstream.core.plan import Extend, Settled, StepPlan, StepResult, TokenLogprobs
from millstream.core.registry import Choice
from millstream.core.request import MAX_SEED, Kind, Limits, Prior, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish, Sequence, Stamps, State
from millstream.decode.protocol import NOT_FINITE, DecodeMethod, Guide, GuideMaker, Observer
from millstream.memory.blocks import BlockFault
from millstream.runner.protocol import Runner, Ticket
from millstream.sched.protocol import LengthPredictor
from millstream.sched.scheduler import Scheduler

SIBLINGS = "siblings"
GUIDES = "guides"
# The engine's own request has an id that no client's has.
SELF_TEST = -1
# To look up a member of an enum takes longer than to compare with it.
_RUNNING = State.RUNNING
_GENERATE = Kind.GENERATE

_log = logging.getLogger(__name__)

Sink = Callable[[Chunk], None]


@dataclass(slots=True)
class _Group:
    """The sequences of one request, and who hears of them."""

    request: Request
    sink: Sink
    seqs: list[Sequence]
    num_outputs: int
    observers: dict[int, list[Observer]] = field(default_factory=dict)
    unfinished: int = 0


_NOTHING = Prior(0)
_PLAIN = Choice("autoregressive")


@dataclass(slots=True)
class _Flight:
    ticket: Ticket
    plan: StepPlan
    epochs: list[int]
    planning_s: float


class Engine:
    """One model's engine. Not thread-safe: everything is called from the thread that steps it.

    `methods` makes the host half of a decode method for one request; `observers` makes the observers of one output;
    `guides` make what says which tokens may come next; `stop_ids` are the model's own end tokens. `wake` is called,
    from any thread, when a sequence that waited for something outside can go on. `lengths` guesses how long outputs
    will be, once a request, before it is ranked.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        limits: Limits,
        stop_ids: frozenset[int] = frozenset(),
        decode: Choice | None = None,
        methods: Callable[[Choice], DecodeMethod] = lambda choice: cast(DecodeMethod, registry.make("decode", choice)),
        observers: Callable[[Request], list[Observer]] = lambda request: [],
        guides: Seq[GuideMaker] = (),
        listeners: Seq[Callable[[Event], None]] = (),
        seed: int | None = None,
        lengths: LengthPredictor | None = None,
    ) -> None:
        self.scheduler, self.runner, self.clock, self.limits = scheduler, runner, clock, limits
        self.stop_ids = stop_ids
        self.decode = decode or Choice("autoregressive")
        self.listeners = list(listeners)
        self._make_method = methods
        self._make_observers = observers
        self._guide_makers = tuple(guides)
        self._unready: list[Sequence] = []
        self.wake: Callable[[], None] = lambda: None
        self.lengths = lengths
        learns = lengths is not None and type(lengths).observe is not LengthPredictor.observe
        self._learner = lengths if learns else None
        self._unguessed: list[int] = []  # requests that nobody has guessed about yet
        self._guess_failed = False
        self.guess_s = 0.0
        self._random = random.Random(seed)
        self._ids = itertools.count()
        self._groups: dict[int, _Group] = {}
        self._flights: deque[_Flight] = deque()
        self._plans = runner.capacity().plans
        self._deadlines: list[tuple[float, int, int]] = []  # when, a serial, request id; entries may be stale
        self._deadline_of: dict[int, int] = {}  # request id -> the serial that counts
        self._serials = itertools.count()
        self._doubt = False  # rows came out not finite, even computed anew, and none has come out well since
        self._broken: str | None = None
        self.counters: Counter[str] = Counter(cold_retries=0, corrupted_requests=0, self_tests=0, timeouts=0)
        self.num_steps = 0
        self.max_running = 0
        scheduler.observe = self.tell

    # -- requests

    def num_outputs(self, request: Request) -> int:
        """How many outputs a request will have. Raises BadRequest or ConfigError when it can never be served."""
        request.check(self.limits)
        return self._make_method(request.decode or self.decode).num_outputs(request)

    def submit(self, request: Request, sink: Sink) -> None:
        """Takes a request; `sink` gets its chunks. Raises BadRequest or ConfigError when it can never be served."""
        request.check(self.limits)
        if request.id in self._groups:
            raise BadRequest("id", request.id, "an id that no request inside has")
        choice = request.decode or self.decode
        method = self._make_method(choice)
        count = method.num_sequences(request)
        asked = [maker.guide(request, self._awake) for maker in self._guide_makers]
        guides = [make for make in asked if make is not None]
        now = self.clock.now()
        params = request.params
        prompt = request.prompt_ids
        if request.kind is _GENERATE:
            room = min(self.limits.max_context, self.limits.kv_tokens + 1)
            max_len = room if params.max_tokens is None else min(room, len(prompt) + params.max_tokens)
            if max_len <= len(prompt):
                raise BadRequest("prompt", f"{len(prompt)} tokens", f"at most {room - 1}")
        else:
            max_len = len(prompt) + 1
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        seed = params.seed if params.seed is not None else self._random.randrange(MAX_SEED)
        priors = self._priors(request, method, count)
        group = _Group(request, sink, [], method.num_outputs(request))
        for index in range(count):
            prior = priors.get(index, _NOTHING)
            if prior.ended:
                continue
            seq = Sequence(
                id=next(self._ids),
                request=request,
                index=index,
                tokens=[*prompt, *prior.tokens],
                num_prompt=len(prompt),
                max_len=max_len,
                seed=seed,
                stop_ids=stop_ids,
                decode=choice,
                method=method,
                stamps=Stamps(min(request.arrival or now, now)),
                guides=tuple(make() for make in guides),
                cumulative_logprob=prior.cumulative_logprob,
            )
            if not all(guide.ready() for guide in seq.guides):
                seq.gates.add(GUIDES)
                self._unready.append(seq)
            if group.seqs:
                # They share the prompt that the first one computes.
                seq.gates.add(SIBLINGS)
            group.seqs.append(seq)
            group.observers[index] = self._watchers(request, prior, seq.guides)
        group.unfinished = len(group.seqs)
        self._groups[request.id] = group
        if self.lengths is not None and request.kind is _GENERATE and request.id != SELF_TEST:
            self._unguessed.append(request.id)
        if request.slo.deadline_s is not None:
            self._set_deadline(request.id, group.seqs[0].stamps.arrival + request.slo.deadline_s)
        for seq in group.seqs:
            self.scheduler.add(seq)
            self.tell(Submitted(now, seq.view))

    def abort(self, request_id: int) -> None:
        """Ends a request now. Unknown and finished ids are ignored."""
        self._end(request_id, Finish.ABORT)

    def _end(self, request_id: int, reason: Finish) -> None:
        group = self._groups.get(request_id)
        if group is not None:
            for seq in list(group.seqs):
                if not seq.finished:
                    self._finish(seq, reason, None)

    @staticmethod
    def _priors(request: Request, method: DecodeMethod, count: int) -> dict[int, Prior]:
        priors = {prior.index: prior for prior in request.prior}
        if priors and not method.resumes:
            raise BadRequest("prior", f"{len(priors)} outputs", "none: this decode method cannot take an output up")
        if any(not 0 <= index < count for index in priors):
            raise BadRequest("prior", sorted(priors), f"outputs from 0 to {count - 1}")
        return priors

    def _watchers(self, request: Request, prior: Prior, guides: tuple[Guide, ...]) -> list[Observer]:
        watchers = [*self._make_observers(request), *guides]
        for watcher in watchers:
            if prior.tokens and watcher.see(prior.tokens) is not None:
                raise BadRequest("prior", f"output {prior.index}", "outputs that nothing ends before they go on")
        return watchers

    @property
    def busy(self) -> bool:
        return bool(self._groups or self._flights)

    def load(self) -> Load:
        ledger = self.scheduler.ledger
        counters: dict[str, float] = {**ledger.stats(), **self.counters, "steps": self.num_steps}
        if self.lengths is not None:
            counters["guess_s"] = self.guess_s
        for maker in self._guide_makers:
            counters.update(maker.counters())
        return Load(self.scheduler.num_waiting, self.scheduler.num_running, ledger.free(), ledger.total(), counters)

    # -- the loop

    def step(self) -> bool:
        """Launches what can be launched and settles the oldest plan in flight; False when there was nothing to do.

        Raises what the runner raises, and EngineClosed when the engine finds that it computes nothing any more.
        """
        if not self.launch():
            return False
        self.collect()
        return True

    def launch(self) -> bool:
        """The first half of a step: launches as many plans as the runner takes. Whether any is in flight now."""
        self._expire(self.clock.now())
        if self._unready:
            self._open_gates()
        if self._unguessed:
            self._guess()
        while len(self._flights) < self._plans:
            started = self.clock.now()
            plan = self.scheduler.plan(started)
            planning_s = self.clock.now() - started
            if plan is not None:
                live = self.scheduler.live
                epochs = [live[extend.seq].epoch for extend in plan.extends]
                self._flights.append(_Flight(self.runner.launch(plan), plan, epochs, planning_s))
                self.max_running = max(self.max_running, self.scheduler.num_running)
            faults = self.scheduler.drain_faults()
            for seq, error in faults:
                # One that was ended by the loss of its sibling has had its error.
                if not seq.finished:
                    self._fault(seq, _told(error))
            if plan is None and not faults:
                break
        return bool(self._flights)

    def collect(self) -> None:
        """The other half: waits for the oldest plan in flight, and settles it. Raises what `step` raises."""
        flight = self._flights.popleft()
        self._settle(flight, self.runner.collect(flight.ticket))
        if self._doubt:
            self._test_self()
        if self._broken is not None:
            raise EngineClosed(self._broken)

    def fail(self, error: BaseException) -> None:
        """Ends every request with an error: the runner is gone."""
        for group in list(self._groups.values()):
            for seq in list(group.seqs):
                if not seq.finished:
                    seq.error = f"the engine failed: {error}"
                    self._finish(seq, Finish.ERROR, None)
        self._flights.clear()

    def close(self) -> None:
        for maker in self._guide_makers:
            maker.close()
        self.runner.close()

    def _awake(self) -> None:
        self.wake()

    def _guess(self) -> None:
        """Has the length predictor say what it can of requests that came in. No request suffers from one that fails."""
        numbers, self._unguessed = self._unguessed, []
        groups = [group for number in numbers if (group := self._groups.get(number)) is not None]
        if not groups or self.lengths is None:
            return
        start = self.clock.now()
        try:
            guesses = self.lengths.guess([group.request for group in groups])
            for group, guess in zip(groups, guesses, strict=True):
                hints = group.request.hints.filled(guess)
                for seq in group.seqs:
                    seq.hints = hints
            self.counters["guessed_requests"] += len(groups)
        except Exception:
            self.counters["guess_failures"] += 1
            self._log_guess("guess")
        self.guess_s += self.clock.now() - start

    def _log_guess(self, where: str) -> None:
        if not self._guess_failed:
            self._guess_failed = True
            name = type(self.lengths).__name__
            _log.exception("length predictor %s failed in %s; further failures are not told", name, where)

    def _open_gates(self) -> None:
        waiting, self._unready = self._unready, []
        for seq in waiting:
            if seq.finished:
                continue
            if all(guide.ready() for guide in seq.guides):
                seq.gates.discard(GUIDES)
            else:
                self._unready.append(seq)

    def _settle(self, flight: _Flight, result: StepResult) -> None:
        now = self.clock.now()
        # What came too late is not told: a request ends at its deadline, not at the end of the step that it falls in.
        self._expire(now)
        self.num_steps += 1
        prompt_tokens = 0
        for extend, settled, epoch in zip(flight.plan.extends, result.settled, flight.epochs, strict=True):
            prompt_tokens += len(extend.tokens) if len(extend.tokens) > 1 or extend.sample is None else 0
            seq = self.scheduler.live.get(extend.seq)
            if seq is None:
                continue  # it ended while this row was in flight
            try:
                self._settle_row(seq, extend, settled, seq.epoch == epoch, now)
            except Exception as error:
                # An observer or a decode method that fails ends the request that it was made for.
                if seq.finished:
                    raise
                self._fault(seq, _told(error))
        if not self._heard:
            return
        plan = flight.plan
        running = self.scheduler.num_running
        self.tell(
            Stepped(
                now,
                plan.id,
                result.seconds,
                len(plan.extends),
                plan.num_tokens,
                prompt_tokens,
                len(self.scheduler.live) - running,
                running,
                self.scheduler.ledger.free(),
                flight.planning_s,
            )
        )

    def _settle_row(self, seq: Sequence, extend: Extend, settled: Settled, current: bool, now: float) -> None:
        count = len(extend.tokens)
        seq.plans_in_flight -= 1
        if seq.void:
            seq.void -= 1
            return
        if extend.sample is not None:
            seq.pending -= 1
        if settled.fault is not None:
            if NOT_FINITE in settled.fault:
                self._not_finite(seq, settled.fault, now)
            else:
                self._fault(seq, settled.fault)
            return
        if settled.tokens or settled.vector is not None:
            self._doubt = False
        if current:
            seq.in_flight -= count
            seq.computed += settled.kept
            if settled.kept < count:
                self.scheduler.ledger.rollback(seq, seq.computed)
            if self._heard:
                told = Prefilled if count > 1 or extend.start < seq.num_prompt else Computed
                self.tell(told(now, seq.view, extend.start, settled.kept))
        if extend.score is not None:
            self._place_scores(seq, extend, settled)
        if settled.vector is not None:
            seq.vector = settled.vector
        if seq.state is _RUNNING and current:
            self.scheduler.ledger.settle(seq, now)
        group = self._groups[seq.request.id]
        accepted = seq.method.accept(seq, settled, self)
        if seq is group.seqs[0] and len(group.seqs) > 1:
            self._share_prompt(group, seq)
        if not seq.finished:
            self._add(seq, group, accepted.tokens, accepted.logprobs, now)
        if not seq.finished and seq.request.kind is not _GENERATE and seq.computed >= seq.num_prompt:
            self._finish(seq, Finish.STOP, None)

    def _add(self, seq: Sequence, group: _Group, tokens: Seq[int], logprobs: Seq[TokenLogprobs], now: float) -> None:
        if not tokens:
            return
        taken: list[int] = []
        reason: Finish | None = None
        stop_reason: int | str | None = None
        for token in tokens:
            seq.tokens.append(token)
            taken.append(token)
            if token in seq.stop_ids and seq.num_output > seq.request.params.min_tokens:
                own = token in seq.request.params.stop_token_ids
                reason, stop_reason = Finish.STOP, token if own else None
                break
            for observer in group.observers[seq.index]:
                halt = observer.see((token,))
                if halt is not None and reason is None:
                    reason, stop_reason = Finish.STOP, halt.stop_reason
            if reason is None and len(seq.tokens) >= seq.max_len:
                reason = Finish.LENGTH
            if reason is not None:
                break
        seq.stamps.first_token = now if seq.stamps.first_token is None else seq.stamps.first_token
        seq.stamps.last_token = now
        kept = tuple(logprobs[: len(taken)])
        if kept:
            seq.cumulative_logprob += sum(entry.chosen.logprob for entry in kept)
        if self._heard:
            self.tell(Emitted(now, seq.view, len(taken)))
        if reason is None:
            prompt_logprobs = None
            if seq.num_output == len(taken) and seq.request.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(seq.prompt_logprobs or [None] * seq.num_prompt)
            group.sink(
                Chunk(
                    seq.request.id,
                    seq.index,
                    tuple(taken),
                    kept,
                    prompt_logprobs,
                    usage=self._usage(seq),
                    cumulative_logprob=seq.cumulative_logprob,
                )
            )
        else:
            self._finish(seq, reason, stop_reason, tuple(taken), kept)

    def _place_scores(self, seq: Sequence, extend: Extend, settled: Settled) -> None:
        if not seq.prompt_logprobs:
            seq.prompt_logprobs = [None] * seq.num_prompt
        for position, entry in enumerate(settled.prompt_logprobs, extend.start + 1):
            seq.prompt_logprobs[position] = entry
        seq.scored = max(seq.scored, extend.start + len(settled.prompt_logprobs))

    def _share_prompt(self, group: _Group, leader: Sequence) -> None:
        ready = leader.computed >= leader.num_prompt and leader.state is _RUNNING
        if not ready and not leader.finished and not leader.gates:
            return  # it lost its place, and will come by here again; one that waits for its siblings will not
        for seq in group.seqs[1:]:
            if SIBLINGS not in seq.gates:
                continue
            seq.gates.discard(SIBLINGS)
            seq.prompt_logprobs = list(leader.prompt_logprobs)
            length = seq.num_prompt - 1
            if ready and length > 0:
                try:
                    # The last prompt token is computed again by each: its logits are what they sample from.
                    self.scheduler.ledger.fork(leader, seq, length)
                except BlockFault:
                    continue  # the leader went on, and a window gave up what they need: each finds its own way
                seq.computed = seq.cached = length
                seq.state = _RUNNING

    # -- what decode methods may do (Hands)

    def siblings(self, seq: Sequence) -> Seq[Sequence]:
        group = self._groups.get(seq.request.id)
        return group.seqs if group is not None else [seq]

    def permute(self, assign: Seq[tuple[Sequence, Sequence, int]]) -> None:
        now = self.clock.now()
        grown = {parent.id: [*parent.tokens] for _, parent, _ in assign}
        computed = {parent.id: parent.computed for _, parent, _ in assign}
        held = [(seq, parent) for seq, parent, _ in assign if parent.state is _RUNNING]
        self.scheduler.ledger.permute([(seq, parent, computed[parent.id]) for seq, parent in held])
        kept = {seq.id for seq, _ in held}
        for seq, parent, token in assign:
            if seq.id not in kept and seq.holdings:
                self.scheduler.ledger.release(seq, now, remember=False)
            seq.tokens = [*grown[parent.id], token]
            seq.computed = computed[parent.id] if seq.id in kept else 0
            seq.state = _RUNNING if seq.id in kept else State.WAITING
            seq.epoch += 1
            seq.in_flight = 0
            seq.stamps.first_token = now if seq.stamps.first_token is None else seq.stamps.first_token
            seq.stamps.last_token = now

    def finish(
        self, seq: Sequence, reason: Finish, stop_reason: int | str | None = None, output: Seq[int] | None = None
    ) -> None:
        if not seq.finished:
            self._finish(seq, reason, stop_reason, replaced=None if output is None else tuple(output))

    # -- rows that are not finite

    def _not_finite(self, seq: Sequence, fault: str, now: float) -> None:
        """What it was computed from may be damaged: the cache gives that to nobody any more, and it is computed anew,
        once, from its first token. Where that gives no better, it ends."""
        self.scheduler.ledger.distrust(seq)
        if seq.cold:
            self.counters["corrupted_requests"] += 1
            self._doubt = seq.request.id != SELF_TEST
            self._fault(seq, f"{fault}; computed again from its first token, they were not either")
            return
        self.counters["cold_retries"] += 1
        seq.preemptions += 1
        seq.cold = True
        seq.void, seq.pending = seq.plans_in_flight, 0
        self.scheduler.forget(seq, now, remember=False)
        self.tell(Preempted(now, seq.view, "recompute"))

    def _test_self(self) -> None:
        """Whether the model still computes anything is asked of a prompt of our own, past all caches."""
        self._doubt = False
        if SELF_TEST in self._groups:
            return
        self.counters["self_tests"] += 1
        _log.warning("rows were not finite, computed anew neither: testing whether the model still computes")
        count = min(8, self.limits.vocab_size, self.limits.max_context - 1, self.limits.kv_tokens)
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        prompt = (Tokens(tuple(range(count))),)
        kind = _GENERATE if _GENERATE in self.limits.kinds else Kind.EMBED
        self.submit(Request(SELF_TEST, prompt, params, kind, cache_salt="\0self-test", decode=_PLAIN), self._tested)
        self._groups[SELF_TEST].seqs[0].cold = True

    def _tested(self, chunk: Chunk) -> None:
        if chunk.finish is Finish.ERROR:
            self._broken = f"the self-test fails: {chunk.error}. Weights or memory are damaged; only a new start helps"
        elif chunk.finish is not None:
            _log.warning("the self-test is passed: it was the requests")

    # -- deadlines

    def _set_deadline(self, request_id: int, when: float) -> None:
        serial = self._deadline_of[request_id] = next(self._serials)
        heapq.heappush(self._deadlines, (when, serial, request_id))
        # Most requests end long before their deadline and leave their entry behind.
        if len(self._deadlines) > 2 * len(self._deadline_of) + 64:
            self._deadlines = [entry for entry in self._deadlines if self._deadline_of.get(entry[2]) == entry[1]]
            heapq.heapify(self._deadlines)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, serial, request_id = heapq.heappop(self._deadlines)
            if self._deadline_of.get(request_id) == serial:
                self.counters["timeouts"] += 1
                self._end(request_id, Finish.TIMEOUT)

    # -- endings

    def _fault(self, seq: Sequence, error: str) -> None:
        seq.error = error
        self._finish(seq, Finish.ERROR, None)
        seq.method.lost(seq, self)

    def _finish(
        self,
        seq: Sequence,
        reason: Finish,
        stop_reason: int | str | None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        replaced: tuple[int, ...] | None = None,
    ) -> None:
        now = self.clock.now()
        group = self._groups[seq.request.id]
        if seq is group.seqs[0] and len(group.seqs) > 1:
            if reason in (Finish.STOP, Finish.LENGTH):
                self._share_prompt(group, seq)
            for sibling in group.seqs[1:]:
                sibling.gates.discard(SIBLINGS)
        if replaced is not None:
            seq.tokens = [*seq.tokens[: seq.num_prompt], *replaced]
            seq.computed = min(seq.computed, seq.num_prompt)
        # After a fault nobody knows what its blocks hold.
        self.scheduler.remove(seq, now, remember=reason is not Finish.ERROR and not seq.cold)
        seq.finish, seq.stop_reason = reason, stop_reason
        seq.stamps.finished = now
        group.unfinished -= 1
        if group.unfinished == 0:
            del self._groups[seq.request.id]
            self._deadline_of.pop(seq.request.id, None)
        self.tell(Finished(now, seq.view, reason))
        stamps = seq.stamps
        metrics = RequestMetrics(
            queue_s=None if stamps.admitted is None else stamps.admitted - stamps.arrival,
            ttft_s=None if stamps.first_token is None else stamps.first_token - stamps.arrival,
            total_s=now - stamps.arrival,
            preemptions=seq.preemptions,
        )
        ends = tokens if replaced is None else replaced
        by_token = reason is Finish.STOP and not isinstance(stop_reason, str) and ends[-1:] != ()
        prompt_logprobs = None
        first = seq.num_output == len(tokens) or replaced is not None
        if seq.request.params.prompt_logprobs is not None and first:
            prompt_logprobs = tuple(seq.prompt_logprobs or [None] * seq.num_prompt)
        group.sink(
            Chunk(
                seq.request.id,
                seq.index,
                tokens,
                logprobs,
                prompt_logprobs,
                vector=seq.vector,
                finish=reason,
                stop_reason=stop_reason,
                stop_token=by_token and ends[-1] in seq.stop_ids,
                error=seq.error,
                usage=self._usage(seq),
                metrics=metrics,
                cumulative_logprob=seq.cumulative_logprob,
                replaced=replaced,
            )
        )

    @staticmethod
    def _usage(seq: Sequence) -> Usage:
        return Usage(seq.num_prompt, seq.num_output, min(seq.cached, seq.num_prompt))

    @property
    def _heard(self) -> bool:
        """Whether anybody hears of events: what is told for every row of every step is not made for nobody."""
        return bool(self.listeners) or self._learner is not None or self.scheduler.policy.observes

    def tell(self, event: Event) -> None:
        """Has policies and listeners hear of what happened."""
        self.scheduler.policy.observe(event)
        if self._learner is not None:
            try:
                self._learner.observe(event)
            except Exception:
                self._log_guess("observe")
        for listener in self.listeners:
            listener(event)


def _told(error: Exception) -> str:
    """What the request's owner reads. Of an error that is not our own, where it came from as well."""
    if isinstance(error, MillstreamError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {Path(frames[-1].filename).stem}.{frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
