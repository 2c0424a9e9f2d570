"""Millstream beside transformers' own generate: same weights, same prompts, greedy, one process, interleaved.

    python benchmarks/against_transformers.py [MODEL] [--repeats 5] [--input-len 64] [--output-len 64] [--json]

Rows: batch 1 on both; 32 requests at once here against transformers one request at a time (its rate from a few of them)
and its padded batch of 32, all in float32; and ours with weights="blocks", whose activations are rounded to 8 bits.
Tokens/s count output tokens over the whole time, prompts included. Medians and range. Prompts are pieces of a text with
different lengths (half to one and a half times --input-len), fresh in every repeat.
transformers reads the same GGUF file; it needs the extra "test", and accelerate for that.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch

from millstream import LLM, SamplingParams
from millstream.sim import data

CROWD = 32
ONE_BY_ONE = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    ours = LLM(args.model, cache={"bytes": "2GiB"})
    blocks = LLM(args.model, weights="blocks", cache={"bytes": "1GiB"})
    source = ours.assembled.source
    theirs = AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name, dtype=torch.float32
    ).eval()
    torch.set_num_threads(ours.assembled.resolved.threads)
    pool = ours.tokenizer.encode(data.text("wikitext2-test")[:400_000])
    draw = random.Random(0)
    greedy = SamplingParams(max_tokens=args.output_len, temperature=0.0, ignore_eos=True)

    def prompts(count: int) -> list[list[int]]:
        out = []
        for _ in range(count):
            length = draw.randint(max(1, args.input_len // 2), args.input_len * 3 // 2)
            start = draw.randrange(len(pool) - length)
            out.append(pool[start : start + length])
        return out

    def here(count: int, llm: LLM = ours) -> float:
        start_prompts = prompts(count)
        start = time.perf_counter()
        outputs = llm.generate(start_prompts, greedy)
        seconds = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == args.output_len for o in outputs)
        return count * args.output_len / seconds

    def generate(batch: list[list[int]]) -> None:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        with torch.inference_mode():
            out = theirs.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=args.output_len,
                min_new_tokens=args.output_len,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == width + args.output_len

    def there(count: int, batch: int) -> float:
        work = prompts(count)
        start = time.perf_counter()
        for lo in range(0, count, batch):
            generate(work[lo : lo + batch])
        return count * args.output_len / (time.perf_counter() - start)

    arms: dict[str, Callable[[], float]] = {
        "millstream, 1 request": lambda: here(1),
        "transformers, 1 request": lambda: there(1, 1),
        f"millstream, {CROWD} at once": lambda: here(CROWD),
        f"transformers, {CROWD} one at a time": lambda: there(ONE_BY_ONE, 1),
        f"transformers, padded batch of {CROWD}": lambda: there(CROWD, CROWD),
        "millstream in blocks, 1 request": lambda: here(1, blocks),
        f"millstream in blocks, {CROWD} at once": lambda: here(CROWD, blocks),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(args.repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rate = arms[name]()
            if turn:  # the first round warms up
                rates[name].append(rate)
            print(f"  {'warm-up' if not turn else f'repeat {turn}'}: {name}: {rate:.1f} tokens/s", file=sys.stderr)
    ours.close()
    blocks.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    a, b, c, d, e, f, g = medians.values()
    ratios = {
        "batch 1": a / b,
        "32 at once against one at a time": c / d,
        "32 at once against padded 32": c / e,
        "in blocks, batch 1": f / b,
        "in blocks, 32 at once against padded 32": g / e,
    }
    if args.json:
        print(json.dumps({"model": args.model, "tokens_per_s": rates, "medians": medians, "ratios": ratios}))
        return 0
    for name, values in rates.items():
        print(f"{name:<42} {medians[name]:8.1f} tokens/s  ({min(values):.1f} to {max(values):.1f})")
    for name, value in ratios.items():
        print(f"{name:<42} {value:8.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
