"""Every two choices together, on tiny models: what is lossless gives the naive generator's tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import beam_oracle
import pytest
import torch
from covering import Case, cover, pairs_of
from harness import Paced

import oracle
import tiny_model
from millstream.core import registry
from millstream.core.clock import WallClock
from millstream.core.errors import ConfigError
from millstream.core.plan import SampleAsk
from millstream.core.registry import Choice
from millstream.core.request import Hints, Limits, Request, SamplingParams, Tokens
from millstream.core.sequence import Finish
from millstream.engine.engine import Engine
from millstream.memory.ledger import Ledger
from millstream.sched.scheduler import Scheduler

BLOCK = 16
LONG = [*range(3, 3 + 2 * BLOCK + 5)]
PROMPTS = ([1, 2, 3], LONG, [*LONG, 7], [*LONG[:BLOCK], 90, 91], [5, 5, 60, 5, 5, 61, 5, 5, 60])

COMPOSITIONS = {
    "splitfuse-3": (Choice("splitfuse", {"budget": 3}), "kv-blocks"),
    "splitfuse-40": (Choice("splitfuse", {"budget": 40}), "seats", "kv-blocks"),
    "two-seats": (Choice("splitfuse", {"budget": 64}), Choice("seats", {"max_rows": 2}), "kv-blocks"),
    "latency-budget": (
        Choice("splitfuse", {"budget": 64}),
        Choice("latency-budget", {"step_s": 0.2, "offline_from": 0}),
        "seats",
        "kv-blocks",
    ),
    "orca": (Choice("orca", {"max_tokens": 64}), "seats", "kv-blocks"),
    "prefill-first": (Choice("prefill-first", {"max_tokens": 64}), "seats", "kv-blocks"),
}
DECODES = {
    "greedy": ({"temperature": 0.0}, None),
    "sampled": ({"temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 11}, None),
    "three": ({"temperature": 1.0, "n": 3, "seed": 5, "min_p": 0.02}, None),
    "penalties": (
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
        None,
    ),
    "bias": ({"temperature": 0.0, "logit_bias": {4: 9.0, 5: -100.0}, "stop_token_ids": (8,), "min_tokens": 3}, None),
    "beam": ({"temperature": 0.0}, Choice("beam", {"width": 3})),
}


@functools.cache
def model(name: str):
    return tiny_model.decoder(name)


@functools.cache
def accepted(name: str, backend: str, kv: str) -> bool:
    try:
        tiny_model.runner(model(name), BLOCK, 4, kv=kv, attention=backend).close()
    except ConfigError:
        return False
    return True


def allowed(case: Case) -> bool:
    if case.get("composition") == "prefill-first" and case.get("policy", "prefill-first") != "prefill-first":
        return False
    if "attention" not in case:
        return True
    # A pair without a model or a KV format is allowed when some choice of them goes with it.
    models = [case["model"]] if "model" in case else sorted(tiny_model.CONFIGS)
    formats = [case["kv"]] if "kv" in case else registry.names("kv")
    return any(accepted(name, case["attention"], kv) for name in models for kv in formats)


def axes() -> dict[str, list[str]]:
    return {
        "model": sorted(tiny_model.CONFIGS),
        "policy": registry.names("policy"),
        "composition": sorted(COMPOSITIONS),
        "prefix": [f"radix/{order}" for order in registry.names("evict")] + ["none"],
        "preemption": ["recompute", "swap"],
        "plans": ["1", "2"],
        "kv": registry.names("kv"),
        "attention": registry.names("attention"),
        "decode": sorted(DECODES),
        "blocks": ["few", "many"],
    }


CASES = cover(axes(), allowed)


def num_tokens(index: int) -> int:
    return 6 + 2 * index


def ask_of(params: SamplingParams, index: int, tokens: Sequence[int], num_prompt: int) -> SampleAsk:
    early = len(tokens) - num_prompt < params.min_tokens
    return SampleAsk(
        params,
        params.seed or 0,
        index,
        len(tokens),
        num_prompt,
        tuple(tokens),
        banned=tuple(sorted(params.stop_token_ids)) if early else (),
        top_logprobs=0,
    )


@functools.cache
def logits(name: str, tokens: tuple[int, ...]) -> torch.Tensor:
    return oracle.logits(model(name), list(tokens))[-1:].clone()


@functools.cache
def truth(name: str, decode: str, place: int, index: int) -> tuple[list[int], list[float]]:
    """Tokens one at a time from a forward pass over everything before, and how clear each greedy choice was."""
    given, method = DECODES[decode]
    prompt, count = PROMPTS[place], num_tokens(place)
    if method is not None:

        def ranked(tokens, vocab):
            row = logits(name, tuple(tokens))[0].log_softmax(-1)
            return [(float(value), token) for token, value in enumerate(row)]

        found = beam_oracle.search(prompt, 3, count, tiny_model.VOCAB, ranked=ranked)
        return found[index][1], [1.0] * count
    params = SamplingParams(**given)
    plain = registry.get_device("decode", "autoregressive")()
    tokens, clear = list(prompt), []
    for _ in range(count):
        row = logits(name, tuple(tokens)).clone()
        chosen, _, faults = plain.settle(row, [ask_of(params, index, tokens, len(prompt))], [list(tokens)])
        assert faults == [None]
        best = row[0].topk(2).values
        clear.append(float(best[0] - best[1]))
        tokens.append(chosen[0])
        if chosen[0] in params.stop_token_ids:
            break
    return tokens[len(prompt) :], clear


def engine_of(case: Case):
    decoder = model(case["model"])
    # Few: the longest sequence alone fills more than half of them.
    num_blocks = 6 if case["blocks"] == "few" else 40
    runner = tiny_model.runner(
        decoder, BLOCK, num_blocks, 4, int(case["plans"]), case["kv"], attention=case["attention"]
    )
    prefix, _, order = case["prefix"].partition("/")
    capacity = runner.capacity()
    ledger = Ledger(
        decoder.spec.groups,
        BLOCK,
        capacity.blocks,
        registry.make("prefix", Choice(prefix, {"evict": order} if order else {})),
        capacity.host_blocks,
    )
    scheduler = Scheduler(
        ledger,
        [registry.make("policy", name) for name in dict.fromkeys((case["policy"], "fcfs"))],
        [registry.make("meter", meter, ledger=ledger) for meter in COMPOSITIONS[case["composition"]]],
        case["preemption"],
        cost=Paced(),
    )
    return Engine(scheduler, runner, WallClock(), Limits(tiny_model.VOCAB, 256, num_blocks * BLOCK), seed=1), ledger


def test_every_two_choices_that_go_together_meet():
    met = set().union(*(pairs_of(case) for case in CASES))
    names = axes()
    for a, b in itertools.combinations(sorted(names), 2):
        for x, y in itertools.product(names[a], names[b]):
            if allowed({a: x, b: y}):
                assert ((a, x), (b, y)) in met, f"{a} {x} never meets {b} {y}"
    product = 1
    for values in names.values():
        product *= len(values)
    assert len(CASES) < product / 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[name] for name in sorted(case)))
def test_choices_that_lose_nothing_give_the_naive_generators_tokens(case):
    engine, ledger = engine_of(case)
    given, method = DECODES[case["decode"]]
    outputs: dict[tuple[int, int], list[int]] = {}
    ends: dict[tuple[int, int], Finish] = {}

    def sink(chunk):
        key = (chunk.request_id, chunk.index)
        outputs.setdefault(key, []).extend(chunk.tokens)
        if chunk.finish is not None:
            assert chunk.error is None
            outputs[key] = list(chunk.replaced) if chunk.replaced is not None else outputs[key]
            ends[key] = chunk.finish

    # Twice over, so that the second round finds the first one's prefixes.
    for turn in range(2):
        for place, prompt in enumerate(PROMPTS):
            params = SamplingParams(max_tokens=num_tokens(place), **given)
            # What policies of oracle arms read.
            hints = Hints(oracle=num_tokens(place))
            engine.submit(
                Request(10 * turn + place, (Tokens(tuple(prompt)),), params, decode=method, hints=hints), sink
            )
            if place % 2:
                engine.step()
        for _ in range(3000):
            if not engine.busy:
                break
            engine.step()
    assert not engine.busy, "no end in sight"
    engine.close()
    ledger.check()
    ledger.index.clear()
    assert ledger.free() == ledger.total()
    width = 3 if case["decode"] in ("three", "beam") else 1
    assert set(ends) == {(10 * t + p, i) for t in range(2) for p in range(len(PROMPTS)) for i in range(width)}
    if not registry.card("kv", case["kv"]).lossless:
        return
    for (request_id, index), got in outputs.items():
        want, clear = truth(case["model"], case["decode"], request_id % 10, index)
        # After a choice between two that are as good as equal, either continuation is right.
        upto = next((place for place, gap in enumerate(clear) if gap < tiny_model.CLEAR_GAP), len(want))
        assert got[:upto] == want[:upto]
        assert upto < len(want) or len(got) == len(want)
