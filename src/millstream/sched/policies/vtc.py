"""The Virtual Token Counter: tenants that want more than there is get equal shares, whatever they send.

Fairness in Serving Large Language Models (Sheng et al., OSDI 2024), the algorithm under DLPM. Each tenant has a counter
of the service that it got: `input_weight` a prompt token, `output_weight` a token of an output, over the tenant's own
weight. Who has got least goes next. A tenant that comes back with nothing under way is lifted to the least counter of
those that wait, so that nobody saves up service by staying away, and a single busy tenant has all of the machine.
When to want it: several tenants, and one of them may send too much. Put it before an order such as fcfs, which orders
the requests of one tenant.

What is charged. A prompt token when it is computed: where a prompt fits in one step, that is the paper's charge at
admission; one that is cut over many steps keeps its place for `quantum` tokens and then gives way to whoever has got
less. A request that waits behind others of its tenant ranks as it will when these have been charged: within one step
as over many, tenants take turns. Who of a tenant goes first is left to the policies that are stacked after this one.
Tokens that a prefix cache held are free, as in DLPM: they take no computing. Nor is anything charged twice: what a
preemption or a lost engine makes us compute again is our affair. Every output counts (n, beams), by the tokens that
came, never by those that were asked for. A request that ends early has paid for what was computed of it.

The bound: of two tenants that both want service all the time, neither gets more than the other by over twice
U = max(input_weight * longest prompt, output_weight * tokens of the KV cache), each divided by the smaller weight.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from millstream.core.events import Admitted, Computed, Emitted, Event, Finished, Preempted, Submitted
from millstream.core.registry import Card
from millstream.core.sequence import SeqView, State
from millstream.sched.protocol import LoadView, Policy, Ranking

# To look up a member of an enum takes longer than to compare with it.
_RUNNING = State.RUNNING


@dataclass(frozen=True, slots=True)
class Config:
    """`weights`: shares of tenants by name, 1 where none is given.

    `quantum`: prompt tokens of one sequence before a tenant that has got less goes first. Fewer shorten the wait behind
    long prompts; more keep fewer half-computed prompts in the KV cache. `remember`: idle tenants whose counter is kept.
    """

    input_weight: float = 1.0
    output_weight: float = 2.0
    weights: Mapping[str, float] = field(default_factory=dict)
    quantum: int = 1024
    remember: int = 4096

    def __post_init__(self) -> None:
        for name in ("input_weight", "output_weight"):
            _positive(name, getattr(self, name))
        if not isinstance(self.weights, Mapping):
            raise TypeError(f"weights must be a mapping from tenants to numbers, got {self.weights!r}")
        for tenant, weight in self.weights.items():
            _positive(f"the weight of {tenant!r}", weight)
        for name in ("quantum", "remember"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer from 1, got {value!r}")


class _Tenant:
    """`prompts`: what is left to charge of the prompt of each of its sequences, in the order in which these came;
    `again`: sequences to be computed again. It wants service while there is any of either. `begun`: of a prompt that
    was begun, the rank at which that was, and how much there was to charge then. `ahead`: of each in `prompts`, what
    those of the tenant that go before it will be charged; None when something has changed. `order`: of `prompts`, who
    goes first by the policies below, as of the plan `seen`; None when it has to be asked for."""

    __slots__ = ("again", "ahead", "begun", "counter", "live", "order", "prompts", "seen", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.counter = 0.0
        self.live = 0
        self.prompts: dict[int, int] = {}
        self.begun: dict[int, tuple[float, int]] = {}
        self.again: set[int] = set()
        self.ahead: dict[int, float] | None = None
        self.order: list[int] | None = None
        self.seen = 0


class Vtc(Policy):
    def __init__(self, config: Config) -> None:
        self.config = config
        self._tenants: dict[str, _Tenant] = {}  # with requests inside
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()
        self._wanting: dict[str, _Tenant] = {}
        self._outputs: dict[int, int] = {}  # by sequence: tokens of its output that were charged
        self._below: Ranking | None = None
        self._below_moves = False  # whether its ranks may change
        self._views: dict[int, SeqView] = {}  # of those in `prompts` of any tenant
        self._view: LoadView | None = None  # of the step that is being planned
        self._places: dict[int, tuple[float, float]] | None = (
            None  # of those that never had one, until something happens
        )
        self._plan = 0  # its number: tenants remember that, since a view holds all sequences that were there
        self._last: _Tenant | None = None  # the last one that wanted service
        self._served = 0.0  # the highest counter at which anybody was served: nobody comes in below

    def atop(self, below: Ranking) -> None:
        self._below, self._below_moves = below, not below.constant_rank

    def rank(self, seq: SeqView, view: LoadView) -> tuple[float, ...]:
        if view is not self._view:
            self._view, self._plan = view, self._plan + 1
            if self._below_moves:
                self._places = None
        tenant = self._tenants.get(seq.tenant)
        if tenant is None:
            return (1.0, self._floor())
        if seq.state is not _RUNNING:
            places = self._places
            if places is None:
                places = self._places = self._take_places()
            place = places.get(seq.id)
            return place or (1.0, tenant.counter + self._ahead(tenant).get(seq.id, 0.0))
        if seq.left <= 1:
            return (0.0, tenant.counter)
        begun = tenant.begun.get(seq.id)
        if begun is None:
            return (1.0, tenant.counter)
        # Kept for a while: where blocks are short, who overtakes a half-computed prompt throws its work away.
        at, all_of_it = begun
        done = all_of_it - tenant.prompts[seq.id]
        return (1.0, at + self._price(tenant, done - done % self.config.quantum))

    def victim(self, running: Seq[SeqView], view: LoadView) -> SeqView | None:
        """The last in rank of the tenant that has got most."""
        return max(reversed(running), key=lambda seq: self._counter(seq.tenant), default=None)

    def observe(self, event: Event) -> None:
        self._places = None
        if isinstance(event, Computed):
            self._computed(event)
        elif isinstance(event, Emitted):
            self._charge_output(event.seq)
        elif isinstance(event, Submitted):
            self._submitted(event.seq)
        elif isinstance(event, Admitted):
            self._admitted(event.seq, event.cached)
        elif isinstance(event, Preempted):
            self._preempted(event.seq)
        elif isinstance(event, Finished):
            self._finished(event.seq)

    def _floor(self) -> float:
        """Where a tenant comes in that wants service anew."""
        wanting = self._wanting.values()
        least = min(tenant.counter for tenant in wanting) if wanting else self._last.counter if self._last else 0.0
        return max(least, self._served)

    def _counter(self, name: str) -> float:
        tenant = self._tenants.get(name)
        return -math.inf if tenant is None else tenant.counter

    def _price(self, tenant: _Tenant, prompt_tokens: int) -> float:
        return self.config.input_weight * prompt_tokens / tenant.weight

    def _take_places(self) -> dict[int, tuple[float, float]]:
        """The ranks of all that have not begun: most of those that wait, and told at once they take little time."""
        places: dict[int, tuple[float, float]] = {}
        for tenant in self._wanting.values():
            ahead, counter, begun = self._ahead(tenant), tenant.counter, tenant.begun
            places |= {seq_id: (1.0, counter + rise) for seq_id, rise in ahead.items() if seq_id not in begun}
        return places

    def _ahead(self, tenant: _Tenant) -> dict[int, float]:
        """Of each sequence in `prompts`: by how much the counter will have risen when those before it were charged."""
        if self._below_moves and tenant.seen != self._plan:
            self._sort(tenant)
        ahead = tenant.ahead
        if ahead is None:
            order, ahead, at = self._order(tenant), {}, 0.0
            price = self.config.input_weight / tenant.weight
            for seq_id in order:
                if (tokens := tenant.prompts.get(seq_id)) is not None:
                    ahead[seq_id] = at
                    at += price * tokens
            tenant.ahead = ahead
        return ahead

    def _order(self, tenant: _Tenant) -> Iterable[int]:
        """Prompts that were begun, then the others by the policies below, among them some that have gone."""
        if self._below is None or self._view is None:
            return tenant.prompts
        if tenant.order is None:
            self._sort(tenant)
        begun = tenant.begun
        return [*begun, *(one for one in tenant.order or () if one not in begun)]

    def _sort(self, tenant: _Tenant) -> None:
        """Asks the policies below who of a tenant goes first. Where that is as it was, nothing else has changed."""
        below, view, views = self._below, self._view, self._views
        if below is None or view is None:
            return
        rank, places = below.rank, {}
        for seq_id in tenant.prompts:
            try:
                places[seq_id] = rank(views[seq_id], view)
            except Exception:
                # Its own turn to be ranked comes, and then it is the one that fails.
                places[seq_id] = (math.inf,)
        order = sorted(places, key=places.__getitem__)
        if order != tenant.order:
            tenant.order, tenant.ahead = order, None
        tenant.seen = self._plan

    def _wants(self, seq: SeqView, tenant: _Tenant) -> None:
        if seq.tenant not in self._wanting:
            tenant.counter = max(tenant.counter, self._floor())
            self._wanting[seq.tenant] = tenant

    def _submitted(self, seq: SeqView) -> None:
        tenant = self._tenants.get(seq.tenant)
        if tenant is None:
            tenant = self._idle.pop(seq.tenant, None) or _Tenant(self.config.weights.get(seq.tenant, 1.0))
            self._tenants[seq.tenant] = tenant
        self._wants(seq, tenant)
        tenant.live += 1
        # All but the first output of a request share the prompt that this one computes, up to its last token.
        tenant.prompts[seq.id] = seq.num_prompt if seq.index == 0 else 1
        tenant.ahead = tenant.order = None
        self._views[seq.id] = seq
        self._outputs[seq.id] = seq.num_output

    def _admitted(self, seq: SeqView, cached: int) -> None:
        tenant = self._tenants.get(seq.tenant)
        if tenant is not None and seq.id in tenant.prompts:
            at = tenant.counter + self._ahead(tenant)[seq.id]
            tenant.prompts[seq.id] = left = max(0, seq.num_prompt - cached)
            tenant.begun[seq.id] = (at, left)
            tenant.ahead = None

    def _computed(self, event: Computed) -> None:
        seq = event.seq
        self._charge_output(seq)
        tenant = self._tenants.get(seq.tenant)
        if tenant is None:
            return
        stop = event.start + event.tokens
        left = tenant.prompts.get(seq.id)
        if left is not None:
            done = max(0, left - max(0, seq.num_prompt - stop))
            tenant.prompts[seq.id] = left - done
            tenant.ahead = None
            self._served = max(self._served, tenant.counter)
            self._charge(tenant, self.config.input_weight * done)
        if stop >= seq.num_prompt and (left is not None or seq.id in tenant.again):
            self._leave(seq, tenant)

    def _preempted(self, seq: SeqView) -> None:
        tenant = self._tenants.get(seq.tenant)
        if tenant is not None and seq.id not in tenant.prompts:
            self._wants(seq, tenant)
            tenant.again.add(seq.id)

    def _finished(self, seq: SeqView) -> None:
        self._charge_output(seq)
        self._outputs.pop(seq.id, None)
        tenant = self._tenants.get(seq.tenant)
        if tenant is None:
            return
        self._leave(seq, tenant)
        tenant.live -= 1
        if tenant.live <= 0:
            self._idle[seq.tenant] = self._tenants.pop(seq.tenant)
            if len(self._idle) > self.config.remember:
                self._idle.popitem(last=False)

    def _leave(self, seq: SeqView, tenant: _Tenant) -> None:
        if tenant.prompts.pop(seq.id, None) is not None:
            tenant.begun.pop(seq.id, None)
            del self._views[seq.id]
            tenant.ahead = None
        tenant.again.discard(seq.id)
        if not tenant.prompts and not tenant.again and self._wanting.pop(seq.tenant, None) is not None:
            self._last = tenant

    def _charge_output(self, seq: SeqView) -> None:
        charged = self._outputs.get(seq.id)
        if charged is not None and (new := seq.num_output - charged) > 0:
            self._outputs[seq.id] = charged + new
            self._charge(self._tenants[seq.tenant], self.config.output_weight * new)

    @staticmethod
    def _charge(tenant: _Tenant, service: float) -> None:
        tenant.counter += service / tenant.weight


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


CARD = Card("vtc", "equal shares for tenants by a virtual counter of tokens (stack it before another order)")
PLUGIN = Vtc
