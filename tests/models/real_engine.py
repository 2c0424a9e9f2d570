"""A real model in our engine beside transformers' own on the same weights: loaded once a run."""

from __future__ import annotations

import functools
from typing import Any

import prompts
import theirs
import torch

import real
from millstream.core.request import SamplingParams
from millstream.engine.llm import LLM
from millstream.models.cache import load_tensors
from millstream.models.source import open_source

NEW_TOKENS = 16


@functools.cache
def transformers_model(name: str) -> Any:
    source = open_source(real.model_path(name))
    # The largest shares the pages that the engine has mapped; the others are unpacked anew, past the cache of weights.
    shared = load_tensors(source, torch.float32) if name == theirs.QWEN25.name else None
    return theirs.model_of(source, shared)


def compare(
    case: theirs.Case, count: int, longest: int, seed: int, more: tuple[int, ...] = (), **options: Any
) -> theirs.Compared:
    """Greedy answers to `count` prompts up to `longest` tokens, all in one batch, held to transformers one by one."""
    compared = theirs.Compared()
    with LLM(str(real.model_path(case.name)), max_context=max(longest, *more, 0) + 64, **options) as llm:
        drawn = prompts.draw(llm.tokenizer.encode, count, longest, seed)
        drawn += [prompts.draw(llm.tokenizer.encode, 1, length, seed + length)[0] for length in more]
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
        outputs = llm.generate(drawn, params)
        assert llm.metrics["max_running"] > 1
    model = transformers_model(case.name)
    for out in outputs:
        assert len(out.outputs[0].token_ids) == NEW_TOKENS
        theirs.hold(case, model, out, compared)
    print(
        f"{case.name}: {len(outputs)} prompts of {min(map(len, drawn))} to {max(map(len, drawn))} tokens, "
        f"{compared.num_tokens} tokens compared, largest logprob difference {compared.largest:.2e}, "
        f"{compared.near_ties} near ties taken the other way"
    )
    return compared
