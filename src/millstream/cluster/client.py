"""Several engines as one EngineClient: a router picks, the fleet counts, and what an engine loses goes on elsewhere.

Each request is read from its engine by a task of its own (a "send"). When the engine is lost (it closes, it raises, it
gives no sign of life), the send is given up and another engine takes the request up from the tokens that there are
(`engine/stream.py`): the client's text is that of an undisturbed run, and no token comes twice. What a given-up send
still says is not heard.

An engine that does not answer is first suspected, and gets nothing new; when it answers again it is as before. Only
after `lost_s` is it lost, for good: its place is never used again. A backend, where there is one, starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from millstream.cluster.config import ClusterConfig
from millstream.cluster.fleet import Fleet, NoEngine
from millstream.cluster.protocol import Autoscaler, Backend, Done, FleetView, Member, Router, least_used
from millstream.core.client import Chunk, EngineClient, Load, ModelFacts
from millstream.core.errors import BadRequest, ConfigError, EngineAway, EngineClosed, MillstreamError
from millstream.core.events import Event
from millstream.core.request import Request
from millstream.core.sequence import Finish
from millstream.engine.feed import EventFeed
from millstream.engine.stream import Stream
from millstream.sched.protocol import StepCost

POLL_S = 0.02
# How much of an engine's pace is what it was before, at each token.
SMOOTH = 0.9
# However slow an engine is, routers see some speed.
LEAST_SPEED = 0.02
BACKOFF_S, BACKOFF_MAX_S = 0.2, 10.0
# What an engine may take to close, or to hear of an abort, before it is not waited for.
CLOSE_S = 5.0

_log = logging.getLogger("millstream.cluster")


class State(enum.Enum):
    STARTING = "starting"
    UP = "up"
    SUSPECTED = "suspected"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(slots=True)
class _Node:
    """An engine, and how it gets on. `pace_s` is seconds a token of an output takes; `begun` outputs wait for one.

    `proven`: it has been up for `stable_s`. `returns`: it is lost, and somebody else may have it come back.
    """

    client: EngineClient
    member: Member
    own: bool
    started_at: float
    base_speed: float = 1.0
    ready: bool = False
    ready_at: float = 0.0
    proven: bool = False
    draining: bool = False
    gone: bool = False
    suspected: bool = False
    returns: bool = False
    answered_at: float = 0.0
    load: Load | None = None
    pace_s: float | None = None
    heard_at: float = 0.0
    begun: int = 0
    probing: bool = False
    tasks: dict[EventFeed, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def place(self) -> int:
        return self.member.place

    @property
    def state(self) -> State:
        if self.gone:
            return State.GONE
        if not self.ready:
            return State.STARTING
        if self.draining:
            return State.DRAINING
        return State.SUSPECTED if self.suspected else State.UP

    def settle(self) -> None:
        """What routers may go by."""
        self.member.up = self.state is State.UP

    def answered(self, now: float) -> None:
        self.answered_at = now


class _Sent:
    """A request that is inside, and the task that reads its engine."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.pump: asyncio.Task[None] | None = None
        self.epoch = 0
        self.aborted = False
        self.waits_since: float | None = None


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine as operators see it. `work_s` is what prompts inside need yet, `pace_s` seconds of a token."""

    name: str
    place: int
    state: str
    requests: int
    prompt_tokens: int
    work_s: float
    speed: float
    pace_s: float | None
    age_s: float
    pid: int | None = None


class ClusterClient:
    """EngineClient over the engines that are added to it, and over those that `backend` makes. For one event loop.

    `start` begins to look after them. Without a backend an engine that is lost and answers again comes back, at a new
    place. `migrations` counts requests that went on elsewhere, `lost` the engines that were lost.
    """

    def __init__(
        self,
        router: Router,
        config: ClusterConfig | None = None,
        backend: Backend | None = None,
        autoscaler: Autoscaler | None = None,
    ) -> None:
        self.config = config or ClusterConfig()
        self.fleet = Fleet(router)
        self.backend, self.autoscaler = backend, autoscaler
        self.migrations = self.lost = 0
        self.target = self.config.replicas if backend is not None else 0
        self._nodes: list[_Node] = []  # by place
        self._sent: dict[int, _Sent] = {}
        self._waiting: dict[int, _Sent] = {}
        self._ids = itertools.count(1)
        self._seeds = random.Random()
        self._facts: ModelFacts | None = None
        self._why = ""
        self._known = asyncio.Event()  # facts, or that there will be none
        self._empty = asyncio.Event()
        self._empty.set()
        self._feeds: dict[EventFeed, tuple[type[Event], ...]] = {}
        self._gone_counters: Counter[str] = Counter()
        self._kept: deque[tuple[float, bool]] = deque()  # when requests with a target ended, and whether it was met
        self._busy_s = self._up_s = 0.0
        self._arrived = self._finished = 0  # since the last view
        self._viewed_at = time.monotonic()
        self._failures = 0
        self._again_at = 0.0
        self._checked_at = time.monotonic()
        self._draining = False
        self._closed = False
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Begins to look after the engines, and goes on until closed. Does not wait for any: `facts` does."""
        if not self._loops:
            self._check()
            self._loops = [asyncio.create_task(self._keep())]
            if self.autoscaler is not None:
                self._loops.append(asyncio.create_task(self._scale(self.autoscaler)))

    # -- members

    async def add(
        self, client: EngineClient, name: str = "", *, speed: float = 1.0, cost: StepCost | None = None
    ) -> int:
        """Takes an engine in once its model is loaded; gives its place.

        Raises ConfigError where it serves something else than the others, EngineClosed where it never loads.
        """
        node = self._enter(client, name, speed, cost, own=False)
        try:
            await self._meet(node)
        except BaseException:
            self._leave_fleet(node)
            raise
        return node.place

    async def remove(self, place: int, drain: bool = True) -> None:
        """Lets an engine go and closes it: when what is inside has ended, or at once, and that goes on elsewhere.

        A place that there is not, or not any more, is nothing.
        """
        if not 0 <= place < len(self._nodes) or self._nodes[place].gone:
            return
        node = self._nodes[place]
        node.draining = True
        node.settle()
        if drain:
            await self._emptied(node)
        if not node.gone:
            self._let_go(node)
            _log.info("engine %s is let go", node.member.name)
        await self._end(node)

    def let_go(self, place: int) -> None:
        """Begins to `remove` an engine, once what is inside has ended; a backend starts another meanwhile."""
        self._background(self.remove(place))

    def members(self) -> list[Replica]:
        """The engines that there are, in order of place; those that are gone are not among them."""
        now = time.monotonic()
        return [
            Replica(
                node.member.name,
                node.place,
                node.state.value,
                node.member.requests,
                node.member.prompt_tokens,
                node.member.work_s,
                node.member.speed,
                node.pace_s,
                now - node.started_at,
                getattr(node.client, "engine_pid", None),
            )
            for node in self._nodes
            if not node.gone
        ]

    def view(self, now: float | None = None) -> FleetView:
        """What an autoscaler sees. What is measured over time begins anew with each call."""
        now = time.monotonic() if now is None else now
        nodes = [node for node in self._nodes if not node.gone]
        loads = [node.load for node in nodes if node.load is not None]
        waiting = sum(load.waiting for load in loads) + len(self._waiting)
        waits = [now - sent.stream.arrived for sent in self._sent.values() if not sent.stream.begun]
        while self._kept and self._kept[0][0] < now - self.config.window_s:
            self._kept.popleft()
        met = [kept for _, kept in self._kept]
        busy = self._busy_s / self._up_s if self._up_s else 0.0
        self._busy_s = self._up_s = 0.0
        arrived, ended, interval_s = self._arrived, self._finished, now - self._viewed_at
        self._arrived, self._finished, self._viewed_at = 0, 0, now
        blocks = sum(load.total_blocks for load in loads)
        return FleetView(
            now=now,
            members=self.fleet.up,
            waiting=waiting,
            running=sum(load.running for load in loads),
            oldest_wait_s=max(waits, default=0.0) if waiting else 0.0,
            busy=busy,
            attainment=sum(met) / len(met) if met else None,
            starting=sum(node.state is State.STARTING for node in nodes),
            arrived=arrived,
            ended=ended,
            interval_s=interval_s,
            kv=1 - sum(load.free_blocks for load in loads) / blocks if blocks else 0.0,
        )

    # -- EngineClient

    @property
    def resumed(self) -> int:
        return self.migrations

    def new_id(self) -> int:
        return next(self._ids)

    async def given_up(self) -> str:
        """Waits until no more engines will be started, and says why."""
        while not self._why or self._closed:
            await asyncio.sleep(self.config.check_s)
        return self._why

    async def facts(self) -> ModelFacts:
        """Those of the engine that was there first; with these all others agree."""
        await self._known.wait()
        if self._facts is None:
            raise EngineClosed(f"no engine of the cluster has loaded its model: {self._why}")
        return self._facts

    async def submit(self, request: Request) -> AsyncIterator[Chunk]:
        sent = self._open(request)
        try:
            while sent.stream.unread:
                yield await sent.stream.next()
        finally:
            self._leave(sent)

    async def abort(self, request_id: int) -> None:
        sent = self._sent.get(request_id)
        if sent is None or not sent.stream.left:
            return
        sent.aborted = True
        place = self.fleet.place_of(request_id)
        if place is None or self._nodes[place].suspected:
            # Whoever has it does not hear it now; when it does, nobody reads it any more.
            self._drop(sent)
            sent.stream.end(Finish.ABORT)
            return
        with contextlib.suppress(EngineClosed, TimeoutError):
            await asyncio.wait_for(self._nodes[place].client.abort(request_id), self.config.suspect_s)
            return
        self._drop(sent)
        sent.stream.end(Finish.ABORT)

    async def events(self, *kinds: type[Event]) -> AsyncIterator[Event]:
        """Those of all engines. `now` is in each engine's own seconds; of one engine they come in order."""
        feed = EventFeed()
        self._feeds[feed] = kinds
        for node in self._nodes:
            self._listen(node, feed)
        if self._closed:
            feed.close()
        try:
            async for event in feed:
                yield event
        finally:
            del self._feeds[feed]
            for node in self._nodes:
                if (task := node.tasks.pop(feed, None)) is not None:
                    task.cancel()

    async def call(self, name: str, **given: Any) -> Any:
        """Asks all engines that are up; numbers of their answers are summed. Raises UnknownName, and EngineAway where
        none answers."""
        nodes = self._up()
        if not nodes:
            raise self._away()
        found = await asyncio.gather(*(node.client.call(name, **given) for node in nodes), return_exceptions=True)
        answers = [one for one in found if not isinstance(one, BaseException)]
        if not answers:
            raise next(one for one in found if isinstance(one, BaseException))
        return _summed(answers)

    async def ready(self) -> bool:
        return bool(self._up()) and not self._draining and not self._closed

    async def drain(self, place: int | None = None) -> None:
        """Takes no more requests (an engine, or all of them) and returns when those inside have finished."""
        if place is None:
            self._draining = True
            await self._empty.wait()
            return
        if not 0 <= place < len(self._nodes):
            raise BadRequest("place", place, f"0 to {len(self._nodes) - 1}")
        self._nodes[place].draining = True
        self._nodes[place].settle()
        await self._emptied(self._nodes[place])

    async def load(self) -> Load:
        nodes = [node for node in self._nodes if not node.gone and node.ready]
        await asyncio.gather(*(self._ask_load(node) for node in nodes))
        loads = [node.load for node in nodes if node.load is not None]
        counters = Counter(self._gone_counters)
        for load in loads:
            for name, value in load.counters.items():
                counters[name] += value  # type: ignore[assignment]
        return Load(
            sum(load.waiting for load in loads) + len(self._waiting),
            sum(load.running for load in loads),
            sum(load.free_blocks for load in loads),
            sum(load.total_blocks for load in loads),
            dict(counters) if loads else {},
        )

    async def adapters(self) -> Sequence[str]:
        """Those that every engine has which is up."""
        held = [set(await node.client.adapters()) for node in self._up()]
        return sorted(set.intersection(*held)) if held else []

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        gone = EngineClosed("the cluster was closed")
        for sent in list(self._sent.values()):
            self._drop(sent)
            sent.stream.fail(gone)
        for feed in self._feeds:
            feed.close()
        for node in self._nodes:
            if not node.gone:
                self._leave_fleet(node)
                self._background(self._end(node))
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=2 * CLOSE_S)
            for task in late:
                task.cancel()
        if self.backend is not None:
            await self.backend.close()
        self._why = self._why or "it was told to close"
        self._known.set()

    # -- requests

    def _open(self, request: Request) -> _Sent:
        if self._closed:
            raise EngineClosed("the cluster was closed")
        if self._draining:
            raise EngineClosed("the cluster is draining")
        # Where all are suspected, it waits for the first that answers again.
        if self._facts is None or not any(node.state in (State.UP, State.SUSPECTED) for node in self._nodes):
            raise self._away()
        request.check(self._facts.limits)
        if request.id in self._sent:
            raise BadRequest("id", request.id, "an id that no request inside has")
        if request.prior:
            raise BadRequest("prior", f"{len(request.prior)} outputs", "none: what is taken up is known here")
        sent = _Sent(Stream(request, self._facts, self._seeds, time.monotonic()))
        self._sent[request.id] = sent
        self._arrived += 1
        self._empty.clear()
        sent.stream.watch_deadline(lambda: self._drop(sent))
        self._send(sent)
        return sent

    def _send(self, sent: _Sent, without: frozenset[int] = frozenset()) -> None:
        """Has an engine work on it; where there is none, it waits for one."""
        stream, now = sent.stream, time.monotonic()
        try:
            request, place = self.fleet.send(stream.again(), now, without)
        except NoEngine:
            if self._hopeless():
                stream.fail(self._away())
                return
            sent.waits_since = now if sent.waits_since is None else sent.waits_since
            self._waiting[stream.request.id] = sent
            return
        except MillstreamError as error:
            stream.fail(error)
            return
        sent.waits_since = None
        self._waiting.pop(request.id, None)
        sent.epoch += 1
        sent.pump = asyncio.create_task(self._pump(sent, self._nodes[place], sent.epoch, request))

    async def _pump(self, sent: _Sent, node: _Node, epoch: int, request: Request) -> None:
        """Reads an engine's answer to a request until it ends, or is to go on elsewhere."""
        stream = sent.stream
        done = _Tally()
        said: dict[int, float] = {}
        try:
            async with contextlib.aclosing(_generator(node.client.submit(request))) as chunks:
                async for chunk in chunks:
                    if chunk.finish is Finish.ERROR and not await self._lives(node):
                        break
                    if sent.epoch != epoch:
                        return
                    now = time.monotonic()
                    self._heard(node, chunk, said, now)
                    done.take(chunk)
                    stream.take(chunk, now)
                    if not stream.left:
                        self._ended(sent, done, now)
                        return
        except BadRequest as error:
            self._drop(sent, own=True)
            stream.fail(error)
            return
        except EngineClosed as error:
            _log.debug("engine %s has no more of request %d: %s", node.member.name, request.id, error)
        except MillstreamError as error:
            self._drop(sent, own=True)
            stream.fail(error)
            return
        except Exception:
            _log.exception("engine %s failed with request %d", node.member.name, request.id)
        finally:
            node.begun -= len(said)
        if sent.epoch == epoch and stream.left:
            self._doubt(node)
            self._move(sent, node.place)

    def _move(self, sent: _Sent, place: int) -> None:
        """Its engine does not have it any more: it goes on elsewhere."""
        self._drop(sent, own=True)
        stream = sent.stream
        if not stream.left or stream.error is not None:
            return
        if sent.aborted:
            stream.end(Finish.ABORT)
            return
        if (error := stream.lost(self.config.max_losses)) is not None:
            stream.fail(error)
            return
        self.migrations += 1
        self._send(sent, frozenset((place,)))

    def _drop(self, sent: _Sent, own: bool = False) -> None:
        """Nothing more is heard of what its engine says, which is told to stop. `own`: this is its own send's doing."""
        sent.epoch += 1
        if sent.pump is not None and not own and sent.pump is not asyncio.current_task():
            self._background(_cancelled(sent.pump))
        sent.pump = None
        self._waiting.pop(sent.stream.request.id, None)
        self.fleet.ended(sent.stream.request.id, Done(0, whole=False), time.monotonic())

    def _ended(self, sent: _Sent, done: _Tally, now: float) -> None:
        stream = sent.stream
        self.fleet.ended(stream.request.id, done.done(), now)
        self._finished += done.whole
        if (met := _met(stream, now)) is not None and done.whole:
            self._kept.append((now, met))

    def _leave(self, sent: _Sent) -> None:
        """Its reader is done with it, or has left."""
        stream = sent.stream
        if stream.timer is not None:
            stream.timer.cancel()
        if stream.left or stream.error is not None:
            self._drop(sent)
        self._sent.pop(stream.request.id, None)
        if not self._sent:
            self._empty.set()

    def _heard(self, node: _Node, chunk: Chunk, said: dict[int, float], now: float) -> None:
        """An engine's pace, from the times between tokens of one output."""
        node.heard_at = now
        node.answered(now)
        if chunk.tokens and chunk.index in said:
            took = (now - said[chunk.index]) / len(chunk.tokens)
            node.pace_s = took if node.pace_s is None else SMOOTH * node.pace_s + (1 - SMOOTH) * took
        if chunk.finish is not None:
            if said.pop(chunk.index, None) is not None:
                node.begun -= 1
        elif chunk.tokens:
            node.begun += chunk.index not in said
            said[chunk.index] = now

    # -- how engines get on

    def _up(self) -> list[_Node]:
        return [node for node in self._nodes if node.member.up]

    def _hopeless(self) -> bool:
        """Whether no engine will be up again by itself."""
        return self.backend is None and all(node.gone for node in self._nodes)

    def _away(self) -> EngineClosed:
        if self._closed or self._why:
            return EngineClosed(f"no engine of the cluster is up, and none will be: {self._why or 'it was closed'}")
        states = Counter(node.state.value for node in self._nodes if not node.gone)
        if self.lost:
            states["lost so far"] = self.lost
        told = ", ".join(f"{count} {state}" for state, count in states.items()) or "there are none"
        return EngineAway(f"no engine of the cluster takes requests now: {told}")

    async def _lives(self, node: _Node) -> bool:
        """Whether an error that it told is the request's own."""
        try:
            return not node.gone and await asyncio.wait_for(node.client.ready(), self.config.suspect_s)
        except (EngineClosed, TimeoutError):
            return False

    def _doubt(self, node: _Node) -> None:
        """It gets nothing until it says that it is well."""
        if node.ready and not node.gone and not node.suspected:
            node.suspected = True
            node.answered_at = min(node.answered_at, time.monotonic() - self.config.suspect_s)
            node.settle()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.config.check_s)
            try:
                self._check()
            except Exception:
                _log.exception("the engines could not be looked after")

    def _check(self) -> None:
        """One look at all engines, and at how many there should be."""
        config, now = self.config, time.monotonic()
        passed_s, self._checked_at = now - self._checked_at, now
        for node in list(self._nodes):
            if node.gone:
                if node.returns and not node.probing:
                    self._background(self._probe_lost(node))
                continue
            if not node.ready:
                continue
            if not node.probing:
                self._background(self._probe(node))
            if node.own and not node.proven and now - node.ready_at >= config.stable_s:
                node.proven, self._failures = True, 0
            self._up_s += passed_s
            self._busy_s += passed_s if node.member.requests else 0.0
            # A pause of this process's own says nothing of the others.
            if passed_s > config.check_s + config.suspect_s:
                node.answered_at += passed_s - config.check_s
            silent_s = now - node.answered_at
            if node.own and self.backend is not None and not self.backend.alive(node.client):
                self._lose(node, "it is gone")
            elif silent_s > config.lost_s:
                self._lose(node, f"no sign of life for {config.lost_s:g} s")
            else:
                self._judge(node, silent_s)
        self._set_speeds(now)
        for sent in list(self._waiting.values()):
            if self.fleet.up:
                self._send(sent)
            elif sent.waits_since is not None and now - sent.waits_since > config.patience_s:
                self._waiting.pop(sent.stream.request.id)
                sent.stream.fail(EngineAway(f"no engine was up within {config.patience_s:g} s"))
        if self.backend is not None:
            self._fill(self.backend, now)

    def _judge(self, node: _Node, silent_s: float) -> None:
        suspected = silent_s >= self.config.suspect_s
        if suspected != node.suspected:
            node.suspected = suspected
            _log.warning("engine %s %s", node.member.name, "does not answer" if suspected else "answers again")
        node.settle()

    async def _probe(self, node: _Node) -> None:
        node.probing = True
        try:
            if await asyncio.wait_for(node.client.ready(), self.config.suspect_s):
                node.answered(time.monotonic())
                if node.suspected and not node.gone:
                    self._judge(node, 0.0)
            await self._ask_load(node)
        except (EngineClosed, TimeoutError):
            pass
        except Exception:
            _log.exception("engine %s could not be asked how it is", node.member.name)
        finally:
            node.probing = False

    async def _probe_lost(self, node: _Node) -> None:
        """One that somebody else keeps may come back, as another."""
        node.probing = True
        with contextlib.suppress(Exception):
            if await asyncio.wait_for(node.client.ready(), self.config.suspect_s):
                node.returns = False  # from here on the new place stands for it
                await self.add(node.client, node.member.name, speed=node.base_speed, cost=node.member.cost)
                return
        node.probing = False

    async def _ask_load(self, node: _Node) -> None:
        with contextlib.suppress(EngineClosed, TimeoutError):
            node.load = await asyncio.wait_for(node.client.load(), self.config.suspect_s)

    def _set_speeds(self, now: float) -> None:
        """An engine whose tokens take longer than those of the others counts as that much slower."""
        paces: dict[int, float] = {}
        for node in self._nodes:
            if node.gone or not node.ready or node.pace_s is None:
                continue
            stalled_s = now - node.heard_at if node.begun > 0 else 0.0
            paces[node.place] = max(node.pace_s, stalled_s)
        if len(paces) < 2:
            return
        usual = statistics.median_low(paces.values())
        for place, pace_s in paces.items():
            node = self._nodes[place]
            share = min(1.0, usual / pace_s) if pace_s > 0 else 1.0
            node.member.speed = node.base_speed * max(LEAST_SPEED, share)

    def _lose(self, node: _Node, why: str) -> None:
        """It is given up: what was inside goes on elsewhere."""
        self.lost += 1
        _log.error("engine %s is lost: %s; %d requests were inside", node.member.name, why, node.member.requests)
        self._let_go(node)
        if node.own:
            if not node.proven:
                self._failed()
            self._background(self._end(node))
        else:
            node.returns = True
        if self._hopeless():
            for sent in list(self._waiting.values()):
                self._waiting.pop(sent.stream.request.id)
                sent.stream.fail(self._away())

    def _let_go(self, node: _Node) -> None:
        self._leave_fleet(node)
        for request in self.fleet.lost(node.place, time.monotonic()):
            if (sent := self._sent.get(request.id)) is not None:
                if sent.pump is not None:
                    self._background(_cancelled(sent.pump))
                self._move(sent, node.place)

    def _leave_fleet(self, node: _Node) -> None:
        node.gone = True
        node.settle()
        for task in node.tasks.values():
            task.cancel()
        node.tasks.clear()
        if node.load is not None:
            self._gone_counters.update({name: value for name, value in node.load.counters.items()})
            for name in _LEVELS:
                self._gone_counters.pop(name, None)

    def _forget(self, node: _Node) -> None:
        """One that was never up: nobody knows its place, so that failed starts need not be kept."""
        if node is self._nodes[-1] and not node.ready:
            self._nodes.pop()
            self.fleet.members.pop()

    async def _emptied(self, node: _Node) -> None:
        while node.member.requests and not node.gone:
            await asyncio.sleep(POLL_S)

    async def _end(self, node: _Node) -> None:
        try:
            if node.own and self.backend is not None:
                await asyncio.wait_for(self.backend.kill(node.client), CLOSE_S)
            else:
                await asyncio.wait_for(node.client.close(), CLOSE_S)
        except Exception as error:
            _log.warning("engine %s could not be closed: %s", node.member.name, error or type(error).__name__)

    # -- how many there are

    def _enter(self, client: EngineClient, name: str, speed: float, cost: StepCost | None, own: bool) -> _Node:
        now = time.monotonic()
        member = self.fleet.add(name or self._free_name(), speed, cost, up=False)
        node = _Node(client, member, own, now, base_speed=speed, answered_at=now, heard_at=now)
        self._nodes.append(node)
        return node

    def _free_name(self) -> str:
        """Names are used again, so that series of metrics are as many as there are engines at once."""
        taken = {node.member.name for node in self._nodes if not node.gone}
        return next(str(number) for number in itertools.count() if str(number) not in taken)

    async def _meet(self, node: _Node) -> None:
        """Waits until it has loaded its model, and takes it in. Raises ConfigError, EngineClosed and TimeoutError."""
        facts = await asyncio.wait_for(node.client.facts(), self.config.start_s)
        if self._facts is None:
            self._facts, self._why = facts, ""
            if facts.seed is not None:
                self._seeds = random.Random(facts.seed)
            self._known.set()
        elif (other := _unlike(self._facts, facts)) is not None:
            raise ConfigError(f"engine {node.member.name} serves something else than the others: {other}")
        elif facts.limits.kv_tokens < self._facts.limits.kv_tokens:
            # What is taken must fit wherever it may go.
            limits = replace(self._facts.limits, kv_tokens=facts.limits.kv_tokens)
            self._facts = replace(self._facts, limits=limits)
        if node.gone:
            raise EngineClosed("it was let go while it loaded its model")
        node.ready, node.ready_at = True, time.monotonic()
        node.heard_at = node.ready_at
        node.answered(node.ready_at)
        node.settle()
        for feed in self._feeds:
            self._listen(node, feed)
        _log.info("engine %s is up", node.member.name)
        for sent in list(self._waiting.values()):
            self._send(sent)

    def _fill(self, backend: Backend, now: float) -> None:
        """Starts what lacks, lets go what is too much."""
        own = [node for node in self._nodes if node.own and not node.gone and not node.draining]
        if len(own) < self.target and now >= self._again_at and not self._why:
            for _ in range(self.target - len(own)):
                name = self._free_name()
                node = self._enter(_Unborn(), name, 1.0, None, own=True)
                self._background(self._bear(backend, node))
        elif len(own) > self.target:
            for _ in range(len(own) - self.target):
                starting = [node for node in own if not node.ready]
                if starting:
                    place = starting[-1].place
                else:
                    place = least_used([node.member for node in own])
                own = [node for node in own if node.place != place]
                self._nodes[place].draining = True
                self._background(self.remove(place))

    async def _bear(self, backend: Backend, node: _Node) -> None:
        """Starts an engine, and sees it through until it is up."""
        _log.info("engine %s is being started", node.member.name)
        try:
            client = await backend.start(node.member.name)
            node.client = client
            if node.gone:
                await backend.kill(client)
                return
            await self._meet(node)
        except Exception as error:
            if node.gone:
                return
            self._failed()
            _log.error("engine %s could not be started: %s", node.member.name, error or type(error).__name__)
            self._leave_fleet(node)
            self._forget(node)
            await self._end(node)
            hopeless = isinstance(error, ConfigError) or self._failures >= self.config.give_up
            if hopeless and not any(not other.gone for other in self._nodes):
                self._give_up(str(error) or type(error).__name__)

    def _failed(self) -> None:
        """A start has come to nothing: the next one waits, longer each time."""
        self._failures += 1
        self._again_at = time.monotonic() + min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (self._failures - 1))

    def _give_up(self, why: str) -> None:
        self._why = why
        _log.error("no more engines are started: %s", why)
        self._known.set()
        for sent in list(self._waiting.values()):
            self._waiting.pop(sent.stream.request.id)
            sent.stream.fail(self._away())

    async def _scale(self, autoscaler: Autoscaler) -> None:
        config = self.config
        while True:
            await asyncio.sleep(config.interval_s)
            try:
                view = self.view()
                wanted = autoscaler.target(view, view.now)
            except Exception:
                _log.exception("the autoscaler failed; there will be %d engines", self.target)
                continue
            bounded = max(config.min_replicas, min(config.most, wanted))
            if bounded != self.target:
                _log.info("from %d engines to %d", self.target, bounded)
                self.target = bounded

    # -- events and small things

    def _listen(self, node: _Node, feed: EventFeed) -> None:
        if node.ready and not node.gone and feed not in node.tasks:
            node.tasks[feed] = asyncio.create_task(self._pass_on(node, feed, self._feeds[feed]))

    async def _pass_on(self, node: _Node, feed: EventFeed, kinds: tuple[type[Event], ...]) -> None:
        with contextlib.suppress(EngineClosed):
            async for event in node.client.events(*kinds):
                feed.put([event])

    def _background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(slots=True)
class _Tally:
    """What the ends of a request's outputs say of its engine's work."""

    num_output: int = 0
    cached: int = 0
    service_s: float = 0.0
    whole: bool = True

    def take(self, chunk: Chunk) -> None:
        if chunk.finish is None:
            return
        self.whole = self.whole and chunk.finish not in (Finish.ABORT, Finish.ERROR)
        if chunk.usage is not None:
            self.num_output += chunk.usage.output_tokens
            self.cached = max(self.cached, chunk.usage.cached_tokens)
        if chunk.metrics is not None:
            self.service_s = max(self.service_s, chunk.metrics.worked_s)

    def done(self) -> Done:
        return Done(self.num_output, self.cached, self.service_s, self.whole)


class _Unborn:
    """Stands for an engine that a backend is about to start."""

    async def close(self) -> None:
        return

    engine_pid = None

    def __getattr__(self, name: str) -> Any:
        raise EngineAway("the engine is being started")


# Of engines that are gone these say nothing of what there is.
_LEVELS = ("idle_blocks", "used_blocks", "holders")
# What engines must have in common for a text to go on in another one as it began.
_ALIKE = ("family", "num_parameters", "quantization", "weights", "dtype", "decode", "version")


def _unlike(one: ModelFacts, other: ModelFacts) -> str | None:
    for name in _ALIKE:
        if getattr(one, name) != getattr(other, name):
            return f"its {name} is {getattr(other, name)}, not {getattr(one, name)}"
    ours, its = one.limits, other.limits
    if (ours.vocab_size, ours.kinds, ours.max_context) != (its.vocab_size, its.kinds, its.max_context):
        return "its limits are others"
    return None


def _met(stream: Stream, now: float) -> bool | None:
    """Whether a request got what it was promised; None where that was nothing."""
    tokens = max(len(output.tokens) for output in stream.outputs)
    pace_s = None if tokens < 2 or stream.first_s is None else (stream.last_s - stream.first_s) / (tokens - 1)
    return stream.request.slo.met(stream.first_s, pace_s, now - stream.arrived)


def _summed(answers: Sequence[Any]) -> Any:
    """Numbers of tables of the same names are summed; of what is no number the first is taken."""
    first = answers[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for answer in answers for name in answer)
        return {name: _summed([answer[name] for answer in answers if name in answer]) for name in names}
    if isinstance(first, int | float) and not isinstance(first, bool):
        return sum(answers)
    return first


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Ends a send. Its engine may take its time to hear of it, or never do."""
    task.cancel()
    await asyncio.wait((task,), timeout=CLOSE_S)


def _generator(chunks: AsyncIterator[Chunk]) -> Any:
    """With a way to be left early."""
    return chunks if hasattr(chunks, "aclose") else _over(chunks)


async def _over(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    async for chunk in chunks:
        yield chunk
