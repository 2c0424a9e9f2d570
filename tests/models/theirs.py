"""transformers' own model on the weights that a source gives, and how the engine's answers are held to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from millstream.engine.outputs import RequestOutput
from millstream.models.source import ModelSource


@dataclass(frozen=True)
class Case:
    """A real model, and how close is equal: float32 on both sides, logits of some tens, sums of thousands."""

    name: str
    atol: float = 1e-3
    near_tie: float = 1e-4


SMOLLM2 = Case("smollm2-135m")
GEMMA3 = Case("gemma3-270m")
QWEN25 = Case("qwen2.5-coder-1.5b")


@dataclass
class Compared:
    """What a comparison came to."""

    num_tokens: int = 0
    largest: float = 0.0
    near_ties: int = 0


def model_of(source: ModelSource, tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The transformers model of a source's config, float32, with its very tensors (or `tensors`, by the same names)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**source.config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    given = {name: (source.tensor(name) if tensors is None else tensors[name]) for name in source.tensor_names()}
    wanted = set(empty.state_dict())
    if config.get_text_config().tie_word_embeddings:
        wanted.discard("lm_head.weight")
        given.pop("lm_head.weight", None)
    assert set(given) == wanted
    empty.load_state_dict(given, strict=False, assign=True)
    empty.tie_weights()
    # What is no weight (the rotary frequencies) was made on the meta device: make it again, for real.
    for module in list(empty.modules()):
        for name, child in list(module.named_children()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                setattr(module, name, _again(child, config))
    assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    return empty.eval()


def _again(module: Any, config: Any) -> Any:
    if "Rotary" in type(module).__name__:
        return type(module)(config)
    # Gemma's embedding keeps its scale, the root of the width, in a buffer.
    weight = module.weight
    made = type(module)(
        module.num_embeddings, module.embedding_dim, module.padding_idx, embed_scale=config.hidden_size**0.5
    )
    made.weight = weight
    return made


@torch.inference_mode()
def rows_of(model: Any, ids: Sequence[int], last: int) -> torch.Tensor:
    """Logprobs (last, vocabulary) of the last rows of one forward pass."""
    logits = model(torch.tensor([list(ids)]), logits_to_keep=last, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def hold(case: Case, model: Any, out: RequestOutput, compared: Compared) -> None:
    """Holds every token of a greedy output, and its logprob, to the rows of one pass over prompt and output.

    A token is the best of its row, or one of the two best where these are within `near_tie`. Raises AssertionError.
    """
    ids, made = out.prompt_token_ids, out.outputs[0]
    assert made.error is None and made.logprobs is not None and len(made.logprobs) == len(made.token_ids)
    rows = rows_of(model, [*ids, *made.token_ids], len(made.token_ids) + 1)
    for at, (token, told) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
        best = torch.topk(rows[at], 2)
        gap = float(best.values[0] - best.values[1])
        where = f"{case.name}, prompt of {len(ids)} tokens, output token {at}"
        if token != int(best.indices[0]):
            assert gap <= case.near_tie and token == int(best.indices[1]), (
                f"{where}: {token}, transformers has {int(best.indices[0])} by {gap:.2e}"
            )
            compared.near_ties += 1
        off = abs(told[token].logprob - float(rows[at][token]))
        assert off <= case.atol, f"{where}: logprob off by {off:.2e}"
        compared.num_tokens += 1
        compared.largest = max(compared.largest, off)
