"""`millstream train-ranker`: learn from a model's own answers how long they will be, for policies that go by it."""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from millstream.cli import output
from millstream.cli.options import MODEL_HELP, engine_arguments, engine_config
from millstream.core.errors import ConfigError

if TYPE_CHECKING:
    from millstream.bench.prompts import Prompt


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    engine_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the model of lengths (default: in the home folder)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a .jsonl of prompts, one a line, with their family if they have one (default: public data sets)",
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="where measured lengths are kept (default: home)")
    parser.add_argument("--most", type=int, metavar="N", help="prompts at most, chosen by chance")
    parser.add_argument("--cap", type=int, default=512, metavar="N", help="tokens of an answer at most (default 512)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of the answers (default 1)")
    parser.add_argument("--top-p", type=float, default=0.9, metavar="X", help="of the answers (default 0.9)")
    parser.add_argument(
        "--trunk-epochs",
        type=int,
        metavar="N",
        help="train the encoder that reads prompts too, N times through them at most (default 3; 0: only heads on it)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from millstream.bench import labels, prompts, ranking
    from millstream.config.load import home
    from millstream.engine.assemble import assemble

    if args.cap < 20 or (args.most is not None and args.most < 20):
        raise ConfigError(f"--cap and --most are at least 20, got {args.cap} and {args.most}")
    epochs = ranking.TRUNK_EPOCHS if args.trunk_epochs is None else args.trunk_epochs
    if epochs < 0:
        raise ConfigError(f"--trunk-epochs is 0 or more, got {epochs}")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", args.model)
    out = args.out or home() / "lengths" / f"{name}.safetensors"
    kept = args.labels or home() / "labels" / f"{name}.jsonl"
    if args.prompts is None:
        learned = prompts.draw(ranking.TRAIN, most_chars=ranking.MOST_CHARS)
        tested = prompts.draw(ranking.TEST, most_chars=ranking.MOST_CHARS)
    else:
        learned, tested = _split(prompts.from_file(args.prompts))
    if args.most is not None:
        share = args.most / (len(learned) + len(tested))
        learned, tested = (
            random.Random(0).sample(part, max(2, round(share * len(part)))) if share < 1 else part
            for part in (learned, tested)
        )
    started = time.perf_counter()
    with output.json_only(args.json):
        made = assemble(args.model, engine_config(args), tune=True, notice=None if args.json else output.note)
        serving = labels.Serving.by(made, args.model, args.cap, args.temperature, args.top_p)
        asked = [*learned, *tested]
        random.Random(1).shuffle(asked)
        missing = len(labels.missing(serving, asked, kept))
        with output.progress_bar(missing, "answers", off=args.json) as advance:
            answered = labels.collect(made.engine, made.tokenizer, serving, asked, kept, progress=advance)
        answered_s = time.perf_counter() - started
        label_of = {label.prompt: label for label in answered}
        found = [[label_of[prompt] for prompt in part if prompt in label_of] for part in (learned, tested)]
        total, trained_s = ranking.progressed(*found, epochs), time.perf_counter()
        with output.progress_bar(total, "prompts read", off=args.json) as advance:
            model, _ = ranking.train(
                *found, made.tokenizer, args.cap, served=args.model, trunk_epochs=epochs, progress=advance
            )
        trained_s = time.perf_counter() - trained_s
        model.save(out)
        made.engine.close()
    taus = model.told.get("tau", {})
    if args.json:
        output.emit(
            {
                "path": str(out),
                "labels": str(kept),
                "answers": missing,
                "answers_s": answered_s,
                "trained_s": trained_s,
                "train": len(found[0]),
                "held_out": len(found[1]),
                "tau": taus,
                **({"trunk": model.told["trunk"]} if epochs else {}),
            }
        )
        return 0
    lengths = sorted(label.tokens for label in found[0])
    cut = sum(not label.ended for label in found[0]) / max(1, len(lengths))
    print(f"{missing} answers generated, {sum(map(len, found)) - missing} known before ({kept})")
    print(
        f"answers of {lengths[len(lengths) // 10]} to {lengths[-1 - len(lengths) // 10]} tokens "
        f"(10th and 90th of 100), {100 * cut:.0f} % cut at {args.cap}"
    )
    output.print_table(
        ("order", f"Kendall's tau on {len(found[1])} prompts of other families"),
        [(name, f"{tau:.3f}") for name, tau in taus.items()],
        right=(1,),
    )
    if epochs:
        chosen = model.told["trunk"]
        if chosen["tau"]:
            by = ", ".join(f"{tau:.3f}" for tau in chosen["tau"])
            print(
                f"trunk: epoch {chosen['epoch']} of {epochs} is best on what was set aside (tau from epoch 0 on: {by})"
            )
        else:
            print("trunk: as it is, there are too few prompts to choose epochs by")
    print(f"millstream serve {args.model} --set sched.lengths.name=ranker --set sched.lengths.file={out} \\")
    print("    --set 'sched.policies=[\"ltr\"]'")
    return 0


def _split(given: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and to test on: of other families where there are enough, else a fifth of all."""
    families = sorted({prompt.family for prompt in given})
    if len(families) >= 4:
        aside = set(random.Random(0).sample(families, max(1, len(families) // 5)))
        return [one for one in given if one.family not in aside], [one for one in given if one.family in aside]
    mixed = list(given)
    random.Random(0).shuffle(mixed)
    cut = max(2, len(mixed) // 5)
    return mixed[cut:], mixed[:cut]
