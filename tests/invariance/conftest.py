"""Models and kernels that every property is tested for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import KERNELS, Kernels

import real
import support
from millstream.core.request import SamplingParams
from millstream.models.decoder import Decoder
from millstream.models.load import load_model
from millstream.models.source import open_source
from millstream.ops import table
from support import Bench, Heard


@functools.cache
def real_decoder(name: str, ops: str, weights: str = "dense") -> Decoder:
    with table.use("ref" if ops == "ref" else "auto"):
        return load_model(open_source(real.model_path(name)), weights=weights).decoder


@dataclass(frozen=True)
class Subject:
    """A model on a set of kernels, the naive generator's copy of it, and how their outputs are compared."""

    decoder: Decoder
    reference: Decoder
    kernels: Kernels

    @property
    def block_size(self) -> int:
        return self.kernels.block_size

    def bench(self, **options: Any) -> Bench:
        kernels = self.kernels
        return Bench(
            self.decoder,
            ops=kernels.ops,
            kv=kernels.kv,
            attention=kernels.attention,
            **{"block_size": kernels.block_size, "blocks": 1024 // kernels.block_size, **options},
        )

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        return support.prompt(length, seed, self.decoder.spec.vocab_size)

    def judge(self, heard: Heard, count: int | None = None, alone: bool = True) -> None:
        """Every output of a request: against the naive generator, and against the same request cold and alone."""
        for index in heard.chunks if self.kernels.oracle_atol is not None else ():
            support.judge(self.reference, heard, self.kernels.oracle_atol, self.kernels.near_tie, index, count)
        if alone:
            self.like_alone(heard)

    def like_alone(self, heard: Heard) -> None:
        want = self.alone(heard.request.prompt_ids, heard.request.params)
        for index in heard.chunks:
            self.same(heard, want, index)

    def alone(self, ids: Sequence[int], params: SamplingParams) -> Heard:
        return _alone(self, tuple(ids), _Key(params))

    def same(self, got: Heard, want: Heard, index: int = 0, other: int | None = None) -> None:
        """Two runs of one request, up to the first token that they may differ in (one drawn at a near tie)."""
        other = index if other is None else other
        tokens, wanted = got.tokens(index), want.tokens(other)
        told, wished = got.logprobs(index), want.logprobs(other)
        atol = self.kernels.alone_atol
        for at, (a, b) in enumerate(zip(told, wished, strict=False)):
            if tokens[at] != wanted[at]:
                # That each run's choice is allowed is for `judge` to say; behind it the texts are different ones.
                assert atol > 0, f"output token {at}: {tokens[at]}, alone it was {wanted[at]}"
                return
            assert abs(a.chosen.logprob - b.chosen.logprob) <= atol, (
                f"request {got.request.id}.{index}, output token {at}: {a.chosen.logprob}, alone {b.chosen.logprob}"
            )
        if atol == 0 or not told:
            assert tokens == wanted
        assert got.finish(index) == want.finish(other)


class _Key:
    """SamplingParams by value, as a key."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    def __hash__(self) -> int:
        return hash(repr(self.params))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.params == other.params


@functools.lru_cache(maxsize=4096)
def _alone(subject: Subject, ids: tuple[int, ...], key: _Key) -> Heard:
    bench = subject.bench(prefix="none")
    heard = bench.add(ids, key.params)
    bench.run()
    bench.close()
    return heard


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # The products are so small that a second thread is only waited for, and for long where cores are shared.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=KERNELS, ids=lambda kernels: kernels.name)
def kernels(request: Any) -> Kernels:
    found: Kernels = request.param
    return found


@pytest.fixture(scope="session", params=list(support.TINY))
def subject(request: Any, kernels: Kernels) -> Subject:
    name = request.param
    decoder = support.tiny_decoder(name, kernels.ops, kernels.weights)
    return Subject(decoder, support.tiny_decoder(name, "ref"), kernels)


@pytest.fixture(scope="session")
def real_subject(kernels: Kernels) -> Subject:
    name = "smollm2-135m"
    return Subject(real_decoder(name, kernels.ops, kernels.weights), real_decoder(name, "ref"), kernels)
