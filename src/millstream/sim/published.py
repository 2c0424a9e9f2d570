"""Profiles of GPUs, made from measurements that others have published.

`splitwise-HARDWARE-MODEL-tpN` from the times of prompts and tokens that Splitwise measured (Patel et al., ISCA 2024),
and `vidur-a100-MODEL-tpN` from Vidur's operator times (Agrawal et al., MLSys 2024), whose attention is not among the
data and is derived here from what the hardware can do. Each says in its note what is measured and what is not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from millstream.core import registry
from millstream.core.errors import BadFile
from millstream.core.shape import StepShape
from millstream.sched.profiles import Profile
from millstream.sim import data

COST = "piecewise"
BLOCK = 64
# Of a GPU's memory, what is left for KV beside weights: vLLM's default share.
MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Gpu:
    """Bytes of memory, bytes a second of it, and dense 16-bit operations a second."""

    memory: float
    bytes_per_s: float
    flops: float


@dataclass(frozen=True, slots=True)
class Model:
    layers: int
    heads: int
    kv_heads: int
    head: int
    parameters: float

    @property
    def token_bytes(self) -> int:
        """Of the KV of a token, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head


GPUS: Mapping[str, Gpu] = {
    "a100-80gb": Gpu(80e9, 2.04e12, 312e12),
    "h100-80gb": Gpu(80e9, 3.35e12, 989e12),
    "h100-80gb-pcap": Gpu(80e9, 3.35e12, 989e12),
}
MODELS: Mapping[str, Model] = {
    "llama2-70b": Model(80, 64, 8, 128, 69e9),
    "bloom-176b": Model(70, 112, 112, 128, 176e9),
    "llama2-7b": Model(32, 32, 32, 128, 6.7e9),
    "llama3-8b": Model(32, 32, 8, 128, 8e9),
    "phi-2": Model(32, 32, 32, 80, 2.8e9),
}
_SPLITWISE = [
    *(("llama2-70b", gpu, degree) for gpu in GPUS for degree in (2, 4, 8)),
    *(("bloom-176b", gpu, 8) for gpu in GPUS),
]
_VIDUR = [
    *((model, degree) for model in ("llama2-7b", "llama3-8b") for degree in (1, 2, 4, 8)),
    *(("llama2-70b", degree) for degree in (2, 4, 8)),
    ("phi-2", 1),
]


def _splitwise(model: str, gpu: str, degree: int) -> Profile:
    path = data.find("splitwise-times")
    samples: list[tuple[StepShape, float]] = []
    for number, row in enumerate(csv.DictReader(io.StringIO(data.read(path))), start=2):
        try:
            if (row["model"], row["hardware"], int(row["tensor_parallel"])) != (model, gpu, degree):
                continue
            prompt, batch, tokens = int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"])
            prefill_s, decode_s = float(row["prompt_time"]) / 1000, float(row["token_time"]) / 1000
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {error}") from error
        samples.append((StepShape(batch, batch * prompt, batch * prompt * (prompt + 1) // 2, sampled=batch), prefill_s))
        keys = batch * (prompt + tokens // 2)
        samples.append((StepShape(decode_rows=batch, decode_keys=keys, sampled=batch), decode_s))
    note = "times of whole prompts and of tokens are measured; KV blocks are what is left of the memory by arithmetic"
    return _made(f"splitwise-{gpu}-{model}-tp{degree}", model, gpu, degree, "splitwise", samples, note)


def _vidur(model: str, degree: int) -> Profile:
    name, gpu = f"vidur-a100-{model}", "a100-80gb"
    path = data.find(name)
    shape, machine = MODELS[model], GPUS[gpu]
    samples: list[tuple[StepShape, float]] = []
    for number, row in enumerate(csv.DictReader(io.StringIO(data.read(path))), start=2):
        try:
            if int(row["num_tensor_parallel_workers"]) != degree:
                continue
            count = int(row["num_tokens"])
            layer_ms = sum(float(value or 0) for key, value in row.items() if key in _LAYER)
            base_s = (shape.layers * layer_ms + float(row["time_stats.emb.median"] or 0)) / 1000
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(path, f"line {number}: {error}") from error
        if count > 4096:
            continue
        for context in (256, 1024, 4096):
            # Half of the peak, and four fifths of the memory's pace, are what good kernels reach.
            pairs = count * context
            flops = 4 * pairs * shape.heads * shape.head * shape.layers / degree
            samples.append(
                (StepShape(1, count, pairs, sampled=1), base_s + flops / (0.5 * machine.flops))
                if count > 1
                else (StepShape(decode_rows=1, decode_keys=context, sampled=1), base_s)
            )
            if count <= 256:
                read_s = pairs * shape.token_bytes / degree / (0.8 * machine.bytes_per_s)
                samples.append((StepShape(decode_rows=count, decode_keys=pairs, sampled=count), base_s + read_s))
    note = (
        "operators are measured; attention is derived from bytes and operations; collectives and the host are left out"
    )
    return _made(f"{name}-tp{degree}", model, gpu, degree, "vidur", samples, note)


_LAYER = frozenset(
    f"time_stats.{name}.median"
    for name in (
        *("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm"),
        *("mlp_up_proj", "mlp_act", "mlp_down_proj", "add"),
    )
)


def _made(
    name: str, model: str, gpu: str, degree: int, source: str, samples: list[tuple[StepShape, float]], note: str
) -> Profile:
    cost, shape = registry.make("step-cost", COST), MODELS[model]
    cost.fit(samples)
    room = MEMORY_SHARE * GPUS[gpu].memory * degree - 2 * shape.parameters
    return Profile(
        name,
        model,
        f"{degree} x {gpu}",
        source,
        COST,
        cost.state(),
        blocks=max(1, int(room / (shape.token_bytes * BLOCK))),
        block_size=BLOCK,
        step_tokens=2048,
        max_rows=256,
        max_context=16384,
        token_bytes=shape.token_bytes,
        swap_bytes_per_s=50e9 * degree,
        error=cost.residual(),
        price=degree * (2.0 if gpu.startswith("h100") else 1.2),
        note=note,
    )


PUBLISHED: Mapping[str, Callable[[], Profile]] = {
    **{
        f"splitwise-{gpu}-{model}-tp{degree}": partial(_splitwise, model, gpu, degree)
        for model, gpu, degree in _SPLITWISE
    },
    **{f"vidur-a100-{model}-tp{degree}": partial(_vidur, model, degree) for model, degree in _VIDUR},
}
