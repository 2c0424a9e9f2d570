"""A plan of whole texts carried out by an encoder: one ragged forward pass a step, one vector a row.

Shapes: T tokens of the step, S rows, V numbers of a vector.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from millstream.core.plan import Extend, Settled, StepPlan, StepResult
from millstream.decode.protocol import NOT_FINITE
from millstream.models.encoder import Encoder
from millstream.runner.protocol import Capacity
from millstream.runner.torch_runner import Counters, TorchTicket


class EncoderRunner:
    """Runs `encoder` over at most `rows` texts of at most `context` tokens in a step.

    `pair_id`, where there is one, is the token that stands behind a text: what comes after the first of them in a
    prompt is of the second type (a pair). Nothing is kept between steps, so blocks stand for texts and have no bytes.
    `plans` may be 2, then plans run on a thread while the host prepares the next.
    """

    def __init__(self, encoder: Encoder, rows: int, context: int, plans: int = 1, pair_id: int | None = None) -> None:
        self.encoder, self.rows, self.context, self.plans = encoder, rows, context, plans
        self.pair_id = pair_id
        self._pool = ThreadPoolExecutor(1, "millstream-runner") if plans > 1 else None
        self.counters = Counters()

    def capacity(self) -> Capacity:
        groups = [group.name for group in self.encoder.spec.groups]
        return Capacity(self.plans, self.context, dict.fromkeys(groups, self.rows), dict.fromkeys(groups, 0))

    def launch(self, plan: StepPlan) -> TorchTicket:
        return TorchTicket(plan, self._pool.submit(self._run, plan) if self._pool else None)

    def collect(self, ticket: TorchTicket) -> StepResult:
        future: Future[StepResult] | None = ticket.future
        return self._run(ticket.plan) if future is None else future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        start = time.perf_counter()
        self.counters.steps += 1
        self.counters.tokens += plan.num_tokens
        settled = self._settle(plan.extends) if plan.extends else []
        seconds = time.perf_counter() - start
        self.counters.busy_s += seconds
        return StepResult(plan.id, seconds, tuple(settled))

    def _settle(self, extends: Sequence[Extend]) -> list[Settled]:
        try:
            return self._forward(extends)
        except Exception as error:
            # One bad row must not end the others: each is run alone, and what fails alone is to blame.
            if len(extends) > 1:
                return [row for extend in extends for row in self._settle([extend])]
            return [Settled(extends[0].seq, 0, fault=f"{type(error).__name__} in the forward pass: {error}")]

    def _forward(self, extends: Sequence[Extend]) -> list[Settled]:
        self.counters.forwards += 1
        if any(extend.start for extend in extends):
            raise ValueError("an encoder computes a text whole, from its first token")
        counts = np.fromiter((len(extend.tokens) for extend in extends), np.int32, len(extends))
        query_start = np.zeros(len(extends) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        tokens = np.fromiter((token for extend in extends for token in extend.tokens), np.int64, int(counts.sum()))
        bounds = torch.from_numpy(query_start)
        rows = self.encoder.forward(torch.from_numpy(tokens), bounds, self._types(extends))
        vectors = self.encoder.vectors(rows, bounds)
        finite = torch.isfinite(vectors).all(-1).tolist()
        data = vectors.contiguous().numpy().astype("<f4", copy=False)
        return [
            Settled(extend.seq, len(extend.tokens), vector=data[place].tobytes())
            if finite[place]
            else Settled(extend.seq, 0, fault=NOT_FINITE)
            for place, extend in enumerate(extends)
        ]

    def _types(self, extends: Sequence[Extend]) -> torch.Tensor | None:
        """The type of each token, None where no row has a second text."""
        if self.pair_id is None or self.encoder.spec.num_types < 2:
            return None
        found: list[int] = []
        for extend in extends:
            tokens, count = extend.tokens, len(extend.tokens)
            first = tokens.index(self.pair_id) + 1 if self.pair_id in tokens else count
            found += [0] * first + [1] * (count - first)
        return torch.tensor(found) if any(found) else None
