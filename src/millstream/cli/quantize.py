"""`millstream quantize`: pack a float model's matrices into 4 or 8 bits, calibrated on text, as a folder that loads.

Serve the result by its path: `millstream complete DIR "..."`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from millstream.cli.options import MODEL_HELP
from millstream.cli.output import download_progress, emit, json_only, note, seconds_in_words, size_in_words

# Flags that switch a piece off: (flag, field of Recipe, help).
_PIECES = (
    ("--no-smooth-attention", "smooth_attention", "leave outliers of the keys where they are"),
    ("--no-smooth-outputs", "smooth_outputs", "leave outliers in front of each half's last matrix where they are"),
    ("--no-reorder", "reorder", "leave the MLP's inner channels in their order"),
    ("--no-clip", "clip", "take the whole range of every group"),
    ("--no-gptq", "gptq", "round each weight to the nearest"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--format", default="w4a8", help="of the layers' matrices: w4a8 (default), w8a8, block4, block8"
    )
    parser.add_argument("--head", default="block8", help="of embedding and head (default block8); dense keeps floats")
    parser.add_argument(
        "--group", metavar="N", help="inputs that share a step: 128, 64 or 32 that divide all of them; 0 is per channel"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument("--text", type=Path, metavar="FILE", help="of plain text (default: WikiText-2, train)")
    calibration.add_argument("--samples", type=int, default=32, metavar="N", help="windows of it (default 32)")
    calibration.add_argument("--length", type=int, default=512, metavar="N", help="tokens a window (default 512)")
    calibration.add_argument("--rtn", action="store_true", help="round to nearest, no calibration: all of these off")
    for flag, _, text in _PIECES:
        calibration.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    from millstream.models.quantize.recipe import Recipe

    pieces = {field: not (args.rtn or getattr(args, flag[2:].replace("-", "_"))) for flag, field, _ in _PIECES}
    recipe = Recipe(args.format, args.head, _group(args.group), **pieces, samples=args.samples, length=args.length)
    with json_only(args.json):
        value = _quantize(args, recipe)
        if args.json:
            emit(value)
        else:
            print(
                f"{value['path']}: {value['format']}, {value['bits']:.2f} bits a weight in the layers, "
                f"{size_in_words(value['bytes'])}, in {seconds_in_words(value['seconds'])}"
            )
    return 0


def _group(given: str | None) -> int | str:
    from millstream.core.errors import ConfigError

    if given is None or given == "auto":
        return "auto"
    if not given.isdecimal():
        raise ConfigError(f"--group: got {given!r}, allowed are 'auto', 0 and multiples of 32")
    return int(given)


def _quantize(args: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    from millstream.core.errors import Unsupported
    from millstream.models.opened import open_model
    from millstream.models.quantize.run import float_tensors, quantize
    from millstream.models.quantize.save import check_target, save

    start = time.perf_counter()
    check_target(args.out)
    with download_progress(args.model) as progress:
        opened = open_model(args.model, progress, note)
    if opened.spec.vectors:
        raise Unsupported(f"{args.model} is an encoder; what is quantized are models that generate")
    spec, tensors = float_tensors(opened.source)
    tokens = opened.tokenizer().encode(_text(args.text)) if recipe.needs_text else []
    packed_spec, packed = quantize(spec, tensors, recipe, tokens, _tell(args.model))
    size = save(opened, packed_spec, packed, recipe, args.out)
    first = packed_spec.layers[0].mixer.qkv
    return {
        "path": str(args.out),
        "format": first.format,
        "head": packed_spec.embed_format,
        "bits": first.bits,
        "bytes": size,
        "recipe": recipe.said(),
        "seconds": time.perf_counter() - start,
    }


def _text(path: Path | None) -> str:
    from millstream.core.errors import BadFile

    if path is None:
        from millstream.sim import data

        return data.text("wikitext2-train")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"cannot be read as text: {error}") from error


def _tell(model: str) -> Any:
    last = [0.0]

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            print(
                f"\r{model}: {stage} {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True
            )
        elif done == total or now - last[0] >= 5.0:
            note(f"{model}: {stage} {done} of {total}")
            last[0] = now

    return tell
