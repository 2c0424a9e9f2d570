"""What the time of a step depends on, without what the step says."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.core.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts of one step. A row that computes one token decodes; one that computes more prefills.

    `prefill_pairs` are pairs of a query and a key that it sees, `decode_keys` the keys that decoding rows read, and
    `shared_keys` those of them that are read once for several rows. `sampled` rows need the model's head.
    """

    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_rows: int = 0
    decode_keys: int = 0
    shared_keys: int = 0
    sampled: int = 0

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_rows


def shape_of(plan: StepPlan) -> StepShape:
    """The shape of a plan, as if no two rows shared a prefix."""
    rows = tokens = pairs = decoding = keys = sampled = 0
    for extend in plan.extends:
        count = len(extend.tokens)
        if count == 1:
            decoding += 1
            keys += extend.start + 1
        else:
            rows += 1
            tokens += count
            pairs += count * extend.start + count * (count + 1) // 2
        if extend.sample is not None:
            sampled += 1
        elif extend.score is not None:
            sampled += count
    return StepShape(rows, tokens, pairs, decoding, keys, 0, sampled)
