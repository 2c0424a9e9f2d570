"""How long a model's answers are: it answers each prompt once as it is served, and the lengths are kept in a file.

Efficient LLM Scheduling by Learning to Rank (Fu et al., NeurIPS 2024, section 4.1): labels come from the model that is
served, not from another one, and never from `max_tokens`. A line of the file is a JSON object

    {"key": ..., "prompt": ..., "family": ..., "tokens": 211, "ended": true}

of which `key` names model, formats, prompt, cap and sampling; `ended` is false where the cap cut the answer. What
stands in the file is not generated again, so that a collection that was broken off goes on. The seed of an answer is
that of its prompt (`Serving.params`): whoever serves it so gets an answer of just that length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millstream.bench.drive import drive
from millstream.bench.prompts import Prompt
from millstream.core.errors import BadFile
from millstream.core.request import Request, SamplingParams, Tokens
from millstream.sim.workload import Call

CLIENTS = 64


@dataclass(frozen=True, slots=True)
class Serving:
    """How answers are made: `model` by name, at most `cap` tokens, `temperature` 1 as in the paper (0: greedily).

    `formats`: how weights and KV are kept, for other numbers say other words. Seeds do not go by it.
    """

    model: str
    cap: int = 512
    temperature: float = 1.0
    top_p: float = 0.9
    formats: str = ""

    @classmethod
    def by(cls, made: Any, model: str, cap: int = 512, temperature: float = 1.0, top_p: float = 0.9) -> Serving:
        """By the engine `made`, as it keeps weights and KV."""
        config = made.resolved.config
        return cls(model, cap, temperature, top_p, f"{config.model.weights} {config.cache.kv}")

    def key(self, prompt: str) -> str:
        return _hash(f"{self._told(prompt)}\0{self.formats}")

    def params(self, prompt: str) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.cap,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=int(_hash(self._told(prompt))[:12], 16),
        )

    def _told(self, prompt: str) -> str:
        return f"{self.model}\0{self.cap}\0{self.temperature:g}\0{self.top_p:g}\0{prompt}"


def _hash(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Label:
    """`tokens` of the answer; `ended` by the model, not by the cap. `ids` is the prompt as the model reads it."""

    prompt: Prompt
    ids: tuple[int, ...]
    tokens: int
    ended: bool


def chat_ids(tokenizer: Any, prompt: Prompt, most: int) -> tuple[int, ...]:
    """The prompt as a chat of one message, or as it is where the model has no template; its end, if it is too long."""
    from millstream.text.chat import encode_chat, template_of

    if tokenizer.chat_templates:
        message = [{"role": "user", "content": prompt.text}]
        ids = encode_chat(tokenizer, template_of(tokenizer), message)
    else:
        ids = tokenizer.encode(prompt.text)
    return tuple(ids[-most:])


def collect(
    engine: Any,
    tokenizer: Any,
    serving: Serving,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    most_prompt: int = 1024,
    progress: Callable[[], None] | None = None,
) -> list[Label]:
    """Labels of all prompts, in their order; what is not in `path` yet is generated and written there as it ends.

    A prompt whose answer failed has no label. Raises BadFile for a file that holds something else.
    """
    known = read(path)
    keys = [serving.key(prompt.text) for prompt in prompts]
    ids = [chat_ids(tokenizer, prompt, most_prompt) for prompt in prompts]
    asked: dict[int, tuple[str, Prompt]] = {}
    requests: list[Request] = []
    for key, prompt, prompt_ids in zip(keys, prompts, ids, strict=True):
        if key not in known:
            asked[len(requests)] = (key, prompt)
            requests.append(Request(len(requests), (Tokens(prompt_ids),), serving.params(prompt.text)))
            known[key] = (0, False)
    if requests:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:

            def keep(chunk: Any) -> None:
                if chunk.finish is None:
                    return
                key, prompt = asked[chunk.request_id]
                if chunk.error or chunk.usage is None:
                    del known[key]
                    return
                known[key] = (chunk.usage.output_tokens, chunk.finish.value == "stop")
                tokens, ended = known[key]
                told = {"key": key, "prompt": prompt.text, "family": prompt.family, "tokens": tokens, "ended": ended}
                file.write(json.dumps(told, ensure_ascii=False) + "\n")
                file.flush()
                if progress is not None:
                    progress()

            drive(engine, [replace(one, arrival=0.0) for one in requests], clients=CLIENTS, keep=keep)
    found = zip(keys, prompts, ids, strict=True)
    return [Label(prompt, prompt_ids, *known[key]) for key, prompt, prompt_ids in found if key in known]


def answers(serving: Serving, labels: Sequence[Label], calls: Sequence[Call]) -> dict[int, SamplingParams]:
    """By call, what has it answered as its prompt was when that was measured. Prompts of calls are `ids` of labels."""
    texts = {label.ids: label.prompt.text for label in labels}
    return {call.id: serving.params(texts[call.prompt]) for call in calls}


def missing(serving: Serving, prompts: Sequence[Prompt], path: Path) -> list[Prompt]:
    """Those that have no label in the file yet. Raises BadFile."""
    known = read(path)
    return [prompt for prompt in prompts if serving.key(prompt.text) not in known]


def read(path: Path) -> dict[str, tuple[int, bool]]:
    """Key -> (tokens, ended) of a file of labels; nothing where there is no file. Raises BadFile naming the line."""
    if not path.exists():
        return {}
    out: dict[str, tuple[int, bool]] = {}
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            told = json.loads(line)
            out[str(told["key"])] = (int(told["tokens"]), bool(told["ended"]))
        except (ValueError, KeyError, TypeError) as error:
            # The last line may have been cut by whatever ended the collection.
            if number < len(lines):
                raise BadFile(path, f"line {number} is no label ({type(error).__name__}: {error})") from None
            path.write_text("".join(one + "\n" for one in lines[:-1]), "utf-8")
    return out
