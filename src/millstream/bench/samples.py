"""What a load sends: prompts of the lengths that a data set has, made of text that any server understands.

Texts are ordinary words. With the model's tokenizer at hand a prompt has exactly the asked number of tokens; without
one a word counts as a token, which it is in most vocabularies, and the server's own count is what is reported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from millstream.core.errors import BadFile, BadRequest, UnknownName
from millstream.sim import data, traces

# Frequent and short, so that with a space before it each is one token of nearly every vocabulary.
_TEXT = (
    "the of and to in is was for that on as with by at from his it an were which be this had are not have one their "
    "also has but first new two after who they been other some more time when into over only such many no may most "
    "would than between then up during about there out three state world year use city part well can made will before "
    "under where these later being name same four house each work through while known number called any school war "
    "became group since long music day system end river life back water small good power high left place large set "
    "area home line even head found service second man public land high law light black white court game body air"
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: `num_prompt` tokens are expected to be in the prompt; it comes at `at_s` where the data say so."""

    prompt: str
    num_prompt: int
    max_tokens: int
    at_s: float | None = None


class Encodes(Protocol):
    """The part of a tokenizer that is needed."""

    def encode(self, text: str) -> list[int]: ...


class Texts:
    """Makes texts of words, drawn by `seed`."""

    def __init__(self, tokenizer: Encodes | None = None, seed: int = 0) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._words: Sequence[str] = WORDS
        self._frame = 0
        if tokenizer is not None:
            self._frame = len(tokenizer.encode("the of")) - 2
            one_token = [word for word in WORDS if len(tokenizer.encode(f"the {word}")) - self._frame == 2]
            self._words = one_token or WORDS

    def words(self, count: int, key: str) -> list[str]:
        """The same words for the same key and seed."""
        return random.Random(f"{self._seed}/{key}").choices(self._words, k=count)

    def exact(self, words: list[str], count: int) -> str:
        """A text of `count` tokens (at least 1) that begins with these words as far as they go."""
        tokenizer = self._tokenizer
        words = words[: max(1, count - max(0, self._frame))]
        if tokenizer is None:
            return " ".join(words)
        for _ in range(8):
            over = len(tokenizer.encode(" ".join(words))) - count
            if over == 0 or (over > 0 and len(words) <= 1):
                break
            words = words[:-over] or words[:1] if over > 0 else words + self.words(-over, f"more {words[-1]}")
        return " ".join(words)

    def text(self, count: int, key: str) -> str:
        return self.exact(self.words(count, key), count)

    def shared(self, blocks: Sequence[int], block_tokens: int, count: int, key: str) -> str:
        """A text of `count` tokens whose blocks are equal where their numbers are."""
        words: list[str] = []
        for block in blocks[: -(-count // block_tokens)]:
            words += self.words(block_tokens, f"block {block}")
        return self.exact(words[:count] + self.words(max(0, count - len(words)), key), count)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which data, how many, and how long; what is None is as in the data.

    `length_scale` multiplies lengths of traces. `max_total` is what prompt and output together may have.
    """

    dataset: str = "random"
    path: Path | None = None
    num_prompts: int = 1000
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float = 0.0
    prefix_len: int | None = None
    num_prefixes: int = 10
    length_scale: float = 1.0
    max_total: int | None = None
    shuffle: bool = True
    oversample: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise BadRequest("num_prompts", self.num_prompts, "an integer from 1")
        for name in ("input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadRequest(name, value, "an integer from 1")
        if not 0 <= self.range_ratio < 1:
            raise BadRequest("random_range_ratio", self.range_ratio, "a number from 0, below 1")
        if not self.length_scale > 0:
            raise BadRequest("length_scale", self.length_scale, "a number above 0")


def make(plan: Plan, tokenizer: Encodes | None = None) -> tuple[list[Sample], int]:
    """The samples, and how many of them were cut to `max_total`.

    Raises UnknownName, BadFile, BadRequest and DownloadError.
    """
    texts = Texts(tokenizer, plan.seed)
    if plan.dataset in traces.TRACES or plan.dataset == "timed_trace":
        return _trace(plan, texts)
    if plan.dataset not in _MAKERS:
        raise UnknownName("data set", plan.dataset, names())
    cut = 0
    found = []
    for sample in _MAKERS[plan.dataset](plan, texts):
        if plan.max_total is not None and sample.num_prompt + sample.max_tokens > plan.max_total:
            cut += 1
            prompt = max(1, min(sample.num_prompt, plan.max_total - min(sample.max_tokens, plan.max_total // 2)))
            if prompt < sample.num_prompt:
                sample = replace(sample, prompt=_shorter(sample, prompt, texts), num_prompt=prompt)
            sample = replace(sample, max_tokens=max(1, min(sample.max_tokens, plan.max_total - prompt)))
        found.append(sample)
    return found, cut


def names() -> list[str]:
    return [*_MAKERS, *traces.TRACES, "timed_trace"]


def _shorter(sample: Sample, count: int, texts: Texts) -> str:
    # Text of a data set: cut by its share of characters, then by words until it is short enough.
    text = sample.prompt[: max(1, len(sample.prompt) * count // sample.num_prompt)]
    return texts.exact(text.split(" "), count)


def _random(plan: Plan, texts: Texts) -> list[Sample]:
    draw = random.Random(plan.seed)
    prefix = texts.words(plan.prefix_len or 0, "prefix")
    found = []
    for place in range(plan.num_prompts):
        num_prompt, num_output = (
            draw.randint(round(length * (1 - plan.range_ratio)) or 1, round(length * (1 + plan.range_ratio)))
            for length in (plan.input_len or 1024, plan.output_len or 128)
        )
        count = len(prefix) + num_prompt
        found.append(Sample(texts.exact(prefix + texts.words(num_prompt, f"random {place}"), count), count, num_output))
    return found


def _prefix_repetition(plan: Plan, texts: Texts) -> list[Sample]:
    prefix_len, suffix_len = plan.prefix_len or 256, plan.input_len or 256
    found = []
    for place in range(plan.num_prompts):
        prefix = texts.words(prefix_len, f"prefix {place % max(1, plan.num_prefixes)}")
        count = prefix_len + suffix_len
        words = prefix + texts.words(suffix_len, f"suffix {place}")
        found.append(Sample(texts.exact(words, count), count, plan.output_len or 128))
    if plan.shuffle:
        random.Random(plan.seed).shuffle(found)
    return found


def _sharegpt(plan: Plan, texts: Texts) -> list[Sample]:
    """A ShareGPT file (conversations: first turn and the length of its answer), or `sharegpt-prompts`."""
    rows: list[Sample] = []
    if plan.path is None:
        path = data.find("sharegpt-prompts")
        for line in data.read(path).splitlines():
            row = json.loads(line)
            rows += [
                Sample(one["prompt"], one["Prompt Length"], one["Output Length"], row["timestamp"] / 1000)
                for one in row["requests"]
            ]
        rows = [row for row in rows if row.prompt and row.num_prompt > 0 and row.max_tokens > 0]
    else:
        for number, entry in enumerate(_json_rows(plan.path)):
            try:
                turns = [str(turn["value"]) for turn in entry["conversations"][:2]]
            except (KeyError, TypeError) as error:
                raise BadFile(plan.path, f"entry {number}: no conversations of ShareGPT's form ({error})") from error
            if len(turns) == 2 and all(turns):
                rows.append(Sample(turns[0], _count(turns[0], texts), _count(turns[1], texts)))
    return _picked([replace(row, max_tokens=plan.output_len or row.max_tokens) for row in rows], plan)


def _custom(plan: Plan, texts: Texts) -> list[Sample]:
    """JSON lines of prompt and, optional, output_tokens."""
    if plan.path is None:
        raise BadRequest("dataset_path", None, "the file of --dataset-name custom")
    rows = []
    for number, entry in enumerate(_json_rows(plan.path), start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
            raise BadFile(plan.path, f"line {number}: no prompt")
        output = plan.output_len or int(entry.get("output_tokens") or 256)
        rows.append(Sample(entry["prompt"], _count(entry["prompt"], texts), output))
    return _picked(rows, plan)


_MAKERS: dict[str, Callable[[Plan, Texts], list[Sample]]] = {
    "random": _random,
    "prefix_repetition": _prefix_repetition,
    "sharegpt": _sharegpt,
    "custom": _custom,
}


def _trace(plan: Plan, texts: Texts) -> tuple[list[Sample], int]:
    if plan.dataset != "timed_trace":
        rows = traces.load(plan.dataset)
    elif plan.path is None:
        raise BadRequest("dataset_path", None, "the file of --dataset-name timed_trace")
    else:
        rows = traces.load_file(plan.path)
    found, cut = [], 0
    block_tokens = max(1, round(traces.BLOCK_TOKENS * plan.length_scale))
    for place, row in enumerate(rows[: plan.num_prompts]):
        num_prompt = max(1, round(row.num_prompt * plan.length_scale))
        num_output = plan.output_len or max(1, round(row.num_output * plan.length_scale))
        if plan.max_total is not None and num_prompt + num_output > plan.max_total:
            cut += 1
            num_output = min(num_output, max(1, plan.max_total // 2))
            num_prompt = min(num_prompt, plan.max_total - num_output)
        prompt = texts.shared(row.blocks, block_tokens, num_prompt, f"trace {place}")
        found.append(Sample(prompt, num_prompt, num_output, row.at_s))
    return found, cut


def _picked(rows: list[Sample], plan: Plan) -> list[Sample]:
    """`num_prompts` of them, again and again where there are too few and that is allowed."""
    if not rows:
        raise BadRequest("dataset", plan.dataset, "a data set with at least one usable row")
    if plan.shuffle:
        random.Random(plan.seed).shuffle(rows)
    count = plan.num_prompts
    if len(rows) < count and plan.oversample:
        rows = rows * -(-count // len(rows))
    return rows[:count]


def _count(text: str, texts: Texts) -> int:
    tokenizer = texts._tokenizer
    return len(tokenizer.encode(text)) if tokenizer is not None else max(1, len(text) // 4)


def _json_rows(path: Path) -> list[Any]:
    """A JSON list, or JSON lines."""
    text = data.read(path)
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise BadFile(path, f"is no JSON: {error}") from error
