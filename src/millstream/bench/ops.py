"""The ops of a model one by one: how fast, and what share of what the machine can do.

Every op that has a native implementation is measured on the shapes that the model has when 1, 8 and 64 rows decode and
when a prompt of 512 tokens is computed, beside its reference; so are attention over each kind of pages and the layers
of a whole step as one native call. Weights are the model's own, and calls go from layer to layer as a step does, so
that they come from where they come from in a step and not always from the nearest cache.

Bytes are those that must move: weights, keys and values once, what comes in and goes out once. Operations count
multiply and add apart. A call cannot be quicker than bytes over the memory's rate or operations over the peak of their
kind, whichever is longer: that is its bound, and `share` is this least time over the time it took. It is above one
where caches hold what was counted as memory (`resident_bytes_per_s` says how much that can bring).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from millstream.core import registry
from millstream.core.cache import CacheGroup
from millstream.core.errors import BadRequest
from millstream.formats.weights.protocol import Packed
from millstream.models.blocks.attention import StepContext, step_context
from millstream.models.blocks.linear import weight_format
from millstream.models.decoder import Decoder
from millstream.models.program import Program
from millstream.models.spec import AttentionSpec
from millstream.ops.attention.protocol import AttentionAsk
from millstream.ops.cpu import elementwise as _elementwise  # noqa: F401 - registers
from millstream.ops.cpu import linear as _linear  # noqa: F401 - registers
from millstream.ops.cpu import sampling as _sampling  # noqa: F401 - registers
from millstream.ops.cpu.ceilings import READ_BYTES, Ceilings, measure_ceilings
from millstream.ops.layout import BatchLayout, GroupLayout
from millstream.ops.ref.blocks import linear_blocks
from millstream.ops.ref.channel import linear_channel
from millstream.ops.ref.fpx import embedding_fpx, linear_fpx
from millstream.ops.ref.kv import kv_write, kv_write4, kv_write8
from millstream.ops.ref.linear import linear
from millstream.ops.ref.mlp import silu_mul
from millstream.ops.ref.norm import rms_norm
from millstream.ops.ref.rope import apply_rope
from millstream.ops.ref.sampling import Draw, sample_tokens
from millstream.ops.table import REFERENCE, Op

ROWS = (1, 8, 64)
PREFILL = 512
CONTEXTS = (256, 1024)
BLOCK = 64
# What copies of one op's operands may take: more is memory that no step has at once.
COPIES_BYTES = 256 << 20
SAMPLE_S = 0.005
CEILING_REPEATS = 3
# Slower calls than this are asked fewer times: references of whole matrices.
SLOW_S = 0.1
BLOCKS = ("block4", "block8")
# How each kind of pages is attended to natively, and in which numbers.
PAGES = {"int8": ("cpu-int8", "int8"), "int4": ("cpu-int4", "int8"), "plain": ("cpu-paged", "float32")}
# Layers whose matrices are packed anew into a format that the model is not kept in.
PACKED_LAYERS = 4

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Shapes:
    """`rows` decode at once, `prefill` is the length of a prompt, `contexts` are what a decoding row attends over."""

    rows: tuple[int, ...] = ROWS
    prefill: int = PREFILL
    contexts: tuple[int, ...] = CONTEXTS

    def within(self, context: int) -> Shapes:
        """Those that a model of this context can have. Raises BadRequest when there are none."""
        kept = tuple(one for one in self.contexts if one <= context)
        if not self.rows or min(self.rows) < 1 or not kept:
            raise BadRequest("shapes", self, f"rows from 1 and contexts up to {context}")
        return Shapes(self.rows, min(self.prefill, context), kept)

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.rows, self.prefill)


@dataclass(frozen=True, slots=True)
class Work:
    """One op on one shape. `arms` by implementation take the number of the call; `refused` says why one is missing."""

    op: str
    shape: str
    arms: Mapping[str, Callable[[int], object]]
    num_bytes: int
    num_ops: int
    kind: str = "float32"
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """Median seconds of a call with the quickest and the slowest sample, and what they come to."""

    op: str
    shape: str
    implementation: str
    seconds: float
    low: float
    high: float
    gb_per_s: float
    gop_per_s: float
    bound: str
    share: float


@dataclass(frozen=True, slots=True)
class Measured:
    ceilings: Ceilings
    rows: tuple[Row, ...]
    refused: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return {
            "ceilings": asdict(self.ceilings),
            "rows": [asdict(row) for row in self.rows],
            "refused": dict(self.refused),
        }


@torch.inference_mode()
def measure_ops(
    decoder: Decoder,
    shapes: Shapes | None = None,
    repeats: int = 5,
    only: Sequence[str] = (),
    seed: int = 0,
    say: Say = lambda text: None,
    read_bytes: int = READ_BYTES,
) -> Measured:
    """Every op, and the ceilings before, between and after them; `only` names some ops.

    `decoder` has its matrices in blocks; what is dense in it is measured as float32 alone. Its threads are torch's.
    Raises BadRequest for no repeat and for an op that is not among those measured, KernelError without a compiler.
    """
    if repeats < 1:
        raise BadRequest("repeats", repeats, "an integer from 1")
    shapes = (shapes or Shapes()).within(decoder.spec.context)
    ops = _ops(decoder, shapes, torch.Generator().manual_seed(seed))
    for name in only:
        if name not in ops:
            raise BadRequest("op", name, "one of " + ", ".join(ops))
    resident = sum(decoder.format_bytes().values())
    most = ceilings = measure_ceilings(torch.get_num_threads(), resident, CEILING_REPEATS, read_bytes)
    taken: list[tuple[Work, dict[str, list[float]]]] = []
    refused: dict[str, str] = {}
    for name, works in ops.items():
        if only and name not in only:
            continue
        for work in works():
            # Its operands are let go; what it was stays.
            taken.append((replace(work, arms={}), sample(work, repeats)))
            refused.update({f"{work.op}: {arm}": why for arm, why in work.refused.items()})
        say(f"measured {name}")
        # Clocks and neighbours change within minutes: what was possible once in the run is the ceiling.
        ceilings = measure_ceilings(most.threads, resident, CEILING_REPEATS, read_bytes)
        most = most.best(ceilings)
    return Measured(most, tuple(row for work, found in taken for row in rows_of(work, found, most)), refused)


def sample(work: Work, repeats: int) -> dict[str, list[float]]:
    """Seconds of a call by arm, one value a repeat; samples of all arms in turn."""
    calls, asked, taken = {}, {}, {name: list[float]() for name in work.arms}
    for name, arm in work.arms.items():
        arm(0)
        start = time.perf_counter()
        arm(1)
        seconds = time.perf_counter() - start
        calls[name] = max(1, min(256, int(SAMPLE_S / max(seconds, 1e-7))))
        asked[name] = repeats if seconds < SLOW_S else 1 + repeats // 3
    for turn in range(repeats):
        for name, arm in work.arms.items():
            if turn < asked[name]:
                start = time.perf_counter()
                for number in range(calls[name]):
                    arm(number)
                taken[name].append((time.perf_counter() - start) / calls[name])
    return taken


def rows_of(work: Work, taken: Mapping[str, Sequence[float]], ceilings: Ceilings) -> list[Row]:
    """One row an arm."""
    limits = {"memory": work.num_bytes / ceilings.read_bytes_per_s}
    # A kind that the machine has no instruction for has no peak of its own.
    peak = ceilings.ops_per_s.get(work.kind)
    if peak and work.num_ops:
        limits[work.kind] = work.num_ops / peak
    bound = max(limits, key=limits.__getitem__)
    rows = []
    for name, samples in taken.items():
        median = statistics.median(samples)
        rates = work.num_bytes / median / 1e9, work.num_ops / median / 1e9
        spread = min(samples), max(samples)
        rows.append(Row(work.op, work.shape, name, median, *spread, *rates, bound, limits[bound] / median))
    return rows


# -- what is measured

Works = Callable[[], Iterator[Work]]


def _ops(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> dict[str, Works]:
    """By the op's name, in the order of the table; made when they are asked for, so that memory is not held at once."""
    return {
        "linear_blocks": lambda: _products(decoder, shapes, source, in_blocks=True),
        "linear": lambda: _products(decoder, shapes, source, in_blocks=False),
        "linear_channel": lambda: _packed(decoder, shapes, source, ("w8a8", "w4a8")),
        "linear_fpx": lambda: _packed(decoder, shapes, source, ("fp6-e3m2",)),
        "embedding_fpx": lambda: _looked_up(decoder, shapes, source, "fp6-e3m2"),
        "attention": lambda: _attention(decoder, shapes, source),
        "kv_write8": lambda: _writes(decoder, shapes, source, "int8"),
        "kv_write4": lambda: _writes(decoder, shapes, source, "int4"),
        "kv_write": lambda: _writes(decoder, shapes, source, "plain"),
        "sample_tokens": lambda: _draws(decoder, shapes, source),
        "rms_norm": lambda: _norms(decoder, shapes, source),
        "apply_rope": lambda: _turns(decoder, shapes, source),
        "silu_mul": lambda: _gates(decoder, shapes, source),
        "layers": lambda: _layers(decoder, shapes, source),
    }


def _words(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _arms(
    op: Op[..., Any], calls: Sequence[tuple[Any, ...]]
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """Every implementation of an op over the arguments of `calls` in turn, and why some are missing."""
    arms: dict[str, Callable[[int], object]] = {}
    refused: dict[str, str] = {}
    for name in sorted(op.implementations, key=lambda one: one == REFERENCE):
        found = op.implementations[name]
        refusal = found.accepts(op.ask(*calls[0]))
        if refusal is not None:
            refused[name] = refusal.reason
            continue
        arms[name] = lambda number, function=found.function: function(*calls[number % len(calls)])
    return arms, refused


def _matrices(decoder: Decoder) -> dict[str, list[Packed]]:
    """By what they are, a matrix a layer."""
    found: dict[str, list[Packed]] = {}
    for layer in decoder.layers:
        held = {"attn.qkv": layer.mixer.qkv, "attn.out": layer.mixer.out}
        if layer.mlp is not None:
            held |= {"mlp.gate_up": layer.mlp.gate_up, "mlp.down": layer.mlp.down}
        for name, one in held.items():
            found.setdefault(name, []).append(one.packed)
    return {**found, "head": [decoder.lm_head.packed]}


def _products(decoder: Decoder, shapes: Shapes, source: torch.Generator, in_blocks: bool) -> Iterator[Work]:
    for name, layers in _matrices(decoder).items():
        # Most layers are alike; those of another shape or format would be another row.
        alike = [one for one in layers if (one.format, one.shape) == (layers[0].format, layers[0].shape)]
        outputs, inputs = layers[0].shape
        if in_blocks and layers[0].format not in BLOCKS:
            continue
        size = alike[0].nbytes if in_blocks else 4 * outputs * inputs
        alike = alike[: max(1, COPIES_BYTES // size)]
        weights = alike if in_blocks else [weight_format(one.format).unpack(one).float() for one in alike]
        for tokens in shapes.rows if name == "head" else shapes.tokens:
            x = torch.randn(tokens, inputs, generator=source)
            if in_blocks:
                calls = [(*_arguments(x, one), one.parts.get("bias")) for one in weights]
                op: Op[..., Any] = linear_blocks
                how = f"{calls[0][3]} bits"
            else:
                calls = [(x, one) for one in weights]
                op, how = linear, "float32"
            arms, refused = _arms(op, calls)
            yield Work(
                op.name,
                f"{name} {outputs} x {inputs}, {how}, {_words(tokens, 'token')}",
                arms,
                size + 4 * tokens * (inputs + outputs),
                2 * tokens * inputs * outputs,
                "int8" if in_blocks else "float32",
                refused,
            )


def _packed(decoder: Decoder, shapes: Shapes, source: torch.Generator, forms: Sequence[str]) -> Iterator[Work]:
    """Products of formats that are packed out of floats, by the matrices of some layers, rounded to nearest."""
    held = _matrices(decoder)
    name = next(one for one in ("mlp.gate_up", "attn.qkv") if one in held)
    floats = [weight_format(one.format).unpack(one).float() for one in held[name][:PACKED_LAYERS]]
    outputs, inputs = floats[0].shape
    for form in forms:
        packs = [weight_format(form).pack(one) for one in floats]
        for tokens in shapes.tokens:
            x = torch.randn(tokens, inputs, generator=source)
            op: Op[..., Any] = linear_channel if "stream" in packs[0].parts else linear_fpx
            arms, refused = _arms(op, [_arguments(x, one) for one in packs])
            yield Work(
                op.name,
                f"{name} {outputs} x {inputs}, {form}, {_words(tokens, 'token')}",
                arms,
                packs[0].nbytes + 4 * tokens * (inputs + outputs),
                2 * tokens * inputs * outputs,
                "int8" if op is linear_channel else "",
                refused,
            )


def _arguments(x: torch.Tensor, packed: Packed) -> tuple[Any, ...]:
    form: Any = weight_format(packed.format)
    if "stream" in packed.parts:
        return (x, packed["stream"], packed.shape[0], form.bits)
    return (x, packed["low"], packed["high"], packed["scale"], form.exponent, form.mantissa)


def _looked_up(decoder: Decoder, shapes: Shapes, source: torch.Generator, name: str) -> Iterator[Work]:
    """Rows of a matrix that is packed as an embedding would be."""
    form: Any = weight_format(name)
    one = _matrices(decoder)["attn.qkv"][0]
    packed = form.pack(weight_format(one.format).unpack(one).float())
    outputs, inputs = packed.shape
    for tokens in shapes.tokens:
        which = torch.randint(0, outputs, (tokens,), generator=source)
        parts = (packed["low"], packed["high"], packed["scale"])
        arms, refused = _arms(embedding_fpx, [(which, *parts, inputs, form.exponent, form.mantissa)])
        moved = tokens * (packed.nbytes // outputs + 4 * inputs)
        yield Work("embedding_fpx", f"{_words(tokens, 'row')} of {inputs}, {name}", arms, moved, 0, refused=refused)


def _first_mixer(decoder: Decoder) -> tuple[CacheGroup, AttentionSpec]:
    """The group that attends over everything, or the first one, with its layers' attention."""
    group = next((one for one in decoder.spec.groups if one.window is None), decoder.spec.groups[0])
    return group, next(layer.mixer for layer in decoder.spec.layers if layer.mixer.group == group.name)


def _pages(group: CacheGroup, kv: str, num_tokens: int, layers: int, source: torch.Generator) -> Any:
    """Pages that hold `num_tokens` random tokens in each of some layers, from slot 0 on."""
    held = CacheGroup(group.name, group.keep, group.window, layers, group.kv_heads, group.head_dim)
    blocks = -(-num_tokens // BLOCK)
    pages = registry.make("kv", kv, device=True).allocate(held, blocks, BLOCK, "float32")
    slots = torch.arange(blocks * BLOCK)
    shape = (blocks * BLOCK, group.kv_heads, group.head_dim)
    k, v = torch.randn(shape, generator=source), torch.randn(shape, generator=source)
    for layer in range(layers):
        pages.write(layer, slots, k, v)
    return pages


def _token_bytes(group: CacheGroup, kv: str) -> int:
    """Bytes of one token's keys and values in one layer."""
    return int(registry.make("kv", kv).page_bytes(_one_layer(group), BLOCK, "float32")) // BLOCK


def _one_layer(group: CacheGroup) -> CacheGroup:
    return CacheGroup(group.name, group.keep, group.window, 1, group.kv_heads, group.head_dim)


def _layout(groups: Sequence[str], rows: int, new: int, context: int, source: torch.Generator) -> BatchLayout:
    """`rows` rows with `new` tokens each, the last ones of `context`; their blocks lie in no order."""
    each = -(-context // BLOCK)
    tables = torch.randperm(rows * each, generator=source).view(rows, each)
    positions = torch.arange(context - new, context)
    slots = tables[:, positions // BLOCK] * BLOCK + positions % BLOCK
    group = GroupLayout(slots.reshape(-1), tables.int())
    return BatchLayout(
        torch.arange(rows + 1, dtype=torch.int32) * new,
        positions.repeat(rows),
        torch.full((rows,), context, dtype=torch.int32),
        dict.fromkeys(groups, group),
        BLOCK,
        new,
        context,
    )


def _steps(shapes: Shapes) -> list[tuple[int, int, int]]:
    """(rows, new tokens, context) of the steps that attention is measured in."""
    decodes = [(rows, 1, context) for context in shapes.contexts for rows in shapes.rows]
    return [*decodes, (1, shapes.prefill, shapes.prefill)]


def _seen(new: int, context: int, window: int | None) -> int:
    """Keys that the new tokens of one row see, each its own and those before it."""
    return sum(min(position + 1, window or position + 1) for position in range(context - new, context))


def _attention(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> Iterator[Work]:
    group, mixer = _first_mixer(decoder)
    most = max(rows * context for rows, _, context in _steps(shapes))
    for kv, (native, kind) in PAGES.items():
        token_bytes = _token_bytes(group, kv)
        layers = max(1, min(group.num_layers, COPIES_BYTES // (most * token_bytes)))
        pages = _pages(group, kv, most + BLOCK * max(shapes.rows), layers, source)
        ask = AttentionAsk(
            "cpu", "float32", str(pages.dtype).removeprefix("torch."), pages.layout, mixer.heads, mixer.kv_heads,
            mixer.head_dim, BLOCK, mixer.window, mixer.softcap,
        )  # fmt: skip
        for rows, new, context in _steps(shapes):
            layout = _layout([group.name], rows, new, context, source)
            q = torch.randn(rows * new, mixer.heads, mixer.head_dim, generator=source)
            arms: dict[str, Callable[[int], object]] = {}
            refused: dict[str, str] = {}
            for name in (native, "torch-ref"):
                backend = registry.make("attention", name)
                refusal = backend.accepts(ask)
                if refusal is not None:
                    refused[name] = refusal.reason
                    continue
                arms[name] = _attend(backend, q, pages, layers, backend.prepare(layout), mixer)
            read = min(context, (mixer.window or context) + new - 1)
            yield Work(
                "attention",
                f"{kv} pages, {_words(rows, 'row')} over {context}" if new == 1 else f"{kv} pages, prefill of {new}",
                arms,
                rows * read * token_bytes + 2 * 4 * q.numel(),
                4 * mixer.heads * mixer.head_dim * rows * _seen(new, context, mixer.window),
                kind,
                refused,
            )


def _attend(
    backend: Any, q: torch.Tensor, pages: Any, layers: int, state: Any, mixer: AttentionSpec
) -> Callable[[int], object]:
    return lambda number: backend.run(q, pages, number % layers, state, mixer.scale, mixer.window, mixer.softcap)


def _writes(decoder: Decoder, shapes: Shapes, source: torch.Generator, kv: str) -> Iterator[Work]:
    group, mixer = _first_mixer(decoder)
    token_bytes = _token_bytes(group, kv)
    blocks = 2 * -(-max(shapes.tokens) // BLOCK) + max(shapes.rows)
    layers = max(1, min(group.num_layers, COPIES_BYTES // (blocks * BLOCK * token_bytes)))
    pages = _pages(group, kv, blocks * BLOCK, layers, source)
    for tokens in shapes.tokens:
        # Keys and values come as slices of one product. Decoding rows write to blocks of their own, a prompt to a run.
        qkv = torch.randn(tokens, mixer.heads + 2 * mixer.kv_heads, mixer.head_dim, generator=source)
        k, v = qkv[:, mixer.heads :][:, : mixer.kv_heads], qkv[:, mixer.heads + mixer.kv_heads :]
        slots = torch.arange(tokens) if tokens == shapes.prefill else torch.arange(tokens) * BLOCK + 7
        calls: list[tuple[Any, ...]]
        if kv != "plain":
            calls = [(pages.data[layer], slots, k, v, BLOCK) for layer in range(layers)]
        else:
            calls = [(pages.k[layer], pages.v[layer], slots, k, v) for layer in range(layers)]
        op: Op[..., Any] = {"int8": kv_write8, "int4": kv_write4, "plain": kv_write}[kv]
        arms, refused = _arms(op, calls)
        yield Work(
            op.name, f"{_words(tokens, 'token')}", arms, tokens * (token_bytes + 8 * k[0].numel()), 0, refused=refused
        )


def _draws(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> Iterator[Work]:
    vocabulary = decoder.spec.vocab_size
    logits = torch.randn(max(shapes.rows), vocabulary, generator=source) * 3
    for rows in shapes.rows:
        for cut in ({}, {"top_p": 0.9}):
            given: dict[str, Any] = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **cut}
            draws = [Draw(row, seed=row, index=0, position=7, **given) for row in range(rows)]
            arms, refused = _arms(sample_tokens, [(logits, draws)])
            words = f"{_words(rows, 'row')} of {vocabulary}" + (", top_p 0.9" if cut else "")
            yield Work("sample_tokens", words, arms, 4 * rows * vocabulary, 0, refused=refused)


def _norms(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> Iterator[Work]:
    width = decoder.spec.width
    weight = torch.randn(width, generator=source)
    for tokens in shapes.tokens:
        x = torch.randn(tokens, width, generator=source)
        arms, refused = _arms(rms_norm, [(x, weight, 1e-5)])
        yield Work(
            "rms_norm", f"{_words(tokens, 'token')} of {width}", arms, 8 * x.numel() + 4 * width, 0, refused=refused
        )


def _turns(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> Iterator[Work]:
    """Queries and keys together, as they lie in the product before them."""
    mixer = decoder.layers[0].spec.mixer
    heads, half = mixer.heads + mixer.kv_heads, mixer.head_dim // 2
    for tokens in shapes.tokens:
        qkv = torch.randn(tokens, heads + mixer.kv_heads, mixer.head_dim, generator=source)
        cos, sin = torch.randn(2, tokens, half, generator=source)
        x = qkv[:, :heads]
        arms, refused = _arms(apply_rope, [(x, cos, sin)])
        words = f"{_words(tokens, 'token')}, {heads} heads of {mixer.head_dim}"
        yield Work("apply_rope", words, arms, 8 * (x.numel() + cos.numel()), 0, refused=refused)


def _gates(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> Iterator[Work]:
    """The halves of one product."""
    inner = next((layer.mlp.spec.inner for layer in decoder.layers if layer.mlp is not None), None)
    if inner is None:
        return
    for tokens in shapes.tokens:
        gate, up = torch.randn(tokens, 2 * inner, generator=source).chunk(2, -1)
        arms, refused = _arms(silu_mul, [(gate, up)])
        words = f"{_words(tokens, 'token')} of {inner}"
        yield Work("silu_mul", words, arms, 12 * tokens * inner, 0, refused=refused)


def _layers(decoder: Decoder, shapes: Shapes, source: torch.Generator) -> Iterator[Work]:
    """All layers of a step, as one native call and one after the other. Over 8-bit pages, in the shorter context."""
    spec = decoder.spec
    context = max(min(shapes.contexts), 1)
    steps = [*((rows, 1, context) for rows in shapes.rows), (1, shapes.prefill, shapes.prefill)]
    most = max(rows * -(-length // BLOCK) for rows, _, length in steps) * BLOCK
    pages = {group.name: _pages(group, "int8", most, group.num_layers, source) for group in spec.groups}
    backend = registry.make("attention", "cpu-int8")
    refused: dict[str, str] = {}
    if not isinstance(decoder.program, Program):
        refused["program"] = decoder.program.reason
    weights = sum(linear.packed.nbytes for layer in decoder.layers for linear in layer.linears())
    products = sum(linear.flops for layer in spec.layers for _, linear in layer.linears())
    for rows, new, length in steps:
        layout = _layout(list(pages), rows, new, length, source)
        step = step_context(layout, pages, dict.fromkeys(pages, backend))
        tokens = torch.randint(0, spec.vocab_size, (rows * new,), generator=source)
        arms: dict[str, Callable[[int], object]] = {}
        if not refused:
            arms["program"] = lambda number, tokens=tokens, step=step: decoder.forward(tokens, step)
        arms["one by one"] = lambda number, tokens=tokens, step=step: _one_by_one(decoder, tokens, step)
        seen = attended = 0
        for layer in spec.layers:
            mixer = layer.mixer
            held = _token_bytes(next(one for one in spec.groups if one.name == mixer.group), "int8")
            seen += rows * min(length, (mixer.window or length) + new - 1) * held
            attended += 4 * mixer.heads * mixer.head_dim * rows * _seen(new, length, mixer.window)
        yield Work(
            "layers",
            f"all {spec.num_layers}, " + (f"{_words(rows, 'row')} over {length}" if new == 1 else f"prefill of {new}"),
            arms,
            weights + seen,
            rows * new * products + attended,
            "int8",
            refused,
        )


def _one_by_one(decoder: Decoder, tokens: torch.Tensor, step: StepContext) -> torch.Tensor:
    x = decoder.embed(tokens)
    for layer in decoder.layers:
        x = layer.channel(layer.attend(x, step))
    return x
