"""Prompts that people wrote, by the family that they come from: a data set, or a file of one's own.

What is learned on some families is tested on others: prompts of one data set are too alike to tell learning from
remembering.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.core.errors import BadFile, UnknownName
from millstream.sim import data

MAX_CHARS = 6000


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user says first in a chat."""

    text: str
    family: str


def _field(*names: str) -> Callable[[Any], str]:
    """What stands at `names`, one inside the other."""

    def look(row: Any) -> str:
        for name in names:
            row = row[int(name)] if isinstance(row, list) else row[name]
        return str(row)

    return look


def _letter(row: Any) -> str:
    return "\n".join([str(row["question"]), *map(str, row["options"]), "Answer with the letter only."])


def _topic(row: Any) -> str:
    asked = "Which topic is this news item about: World, Sports, Business or Technology? Answer with one word."
    return f"{asked}\n\n{row[1]}. {row[2]}"


def _next_word(row: Any) -> str:
    return "Which word comes next? Answer with one word.\n\n" + str(row["text"]).rpartition(" ")[0]


def _code(row: Any) -> str:
    return "Complete this Python function:\n" + str(row["prompt"]).strip("\n")


def _paragraph(asked: str) -> Callable[[Any], str]:
    """A paragraph of running text to be worked on; nothing for headings and what is short."""

    def look(line: Any) -> str:
        text = str(line).strip()
        return f"{asked}\n\n{text[:1200]}" if len(text) > 200 else ""

    return look


def _ask(asked: str, look: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda row: f"{look(row)}\n{asked}"


# Family -> the data set, and how a row of it becomes a prompt: chats, questions, sums, programs, and tasks with an
# answer of a word or a sentence. An empty prompt is none.
FAMILIES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "sharegpt": ("sharegpt-prompts", _field("requests", "0", "prompt")),
    "arena-hard": ("arena-hard", _field("prompt")),
    "gsm8k": ("gsm8k-train", _field("question")),
    "gsm8k-number": ("gsm8k-train", _ask("Give only the number.", _field("question"))),
    "mbpp": ("mbpp", _code),
    "mbpp-docs": ("mbpp", _ask("What does this function do? Answer in one sentence.", _field("prompt"))),
    "truthfulqa": ("truthfulqa", _field("Question")),
    "truthfulqa-brief": ("truthfulqa", _ask("Answer in one short sentence.", _field("Question"))),
    "strategyqa": ("strategyqa", lambda row: f"{row['question']} Answer yes or no."),
    "strategyqa-steps": ("strategyqa", _ask("Think step by step, then answer.", _field("question"))),
    "aqua": ("aqua", _letter),
    "banking77": (
        "banking77",
        lambda row: f"What is this customer's question about? Answer in two or three words.\n\n{row['text']}",
    ),
    "wikitext-title": ("wikitext2-train", _paragraph("Give this text a title of at most five words.")),
    "wikitext-summary": ("wikitext2-train", _paragraph("Summarize this text in one sentence.")),
    "oasst": ("oasst-prompts", _field("prompt", "text")),
    "ifeval": ("ifeval", _field("prompt")),
    "mt-bench": ("mt-bench", _field("turns", "0")),
    "vicuna-bench": ("vicuna-bench", _field("turns", "0")),
    "humaneval": ("humaneval", _code),
    "ag-news": ("ag-news", _topic),
    "lambada": ("lambada", _next_word),
}
# Files of plain rows, without names of columns.
BARE = frozenset({"ag-news"})


def family(name: str) -> list[Prompt]:
    """Every prompt of a family once, in the order of the data set. Raises UnknownName, DownloadError and BadFile."""
    if name not in FAMILIES:
        raise UnknownName("family of prompts", name, FAMILIES)
    source, look = FAMILIES[name]
    path = data.find(source)
    return _unique(_rows(path, data.read(path), source in BARE), look, name, path)


def files(names: Iterable[str]) -> dict[str, Path]:
    """The data sets that families are of. Raises DownloadError."""
    return {name: data.find(name) for name in sorted({FAMILIES[family][0] for family in names})}


def draw(counts: Mapping[str, int], seed: int = 0, most_chars: int = MAX_CHARS) -> list[Prompt]:
    """At most so many prompts of each family, shuffled among each other; none of more than `most_chars` characters."""
    out: list[Prompt] = []
    for name, count in counts.items():
        found = [prompt for prompt in family(name) if len(prompt.text) <= most_chars]
        random.Random(f"{seed}/{FAMILIES[name][0]}").shuffle(found)
        out += found[:count]
    random.Random(seed).shuffle(out)
    return out


def from_file(path: Path) -> list[Prompt]:
    """Prompts of a .jsonl file (objects with "prompt" and perhaps "family", or strings) or of a text, one a line.

    Raises BadFile naming the line.
    """
    text = data.read(path)
    out: list[Prompt] = []
    is_json = ".jsonl" in path.name
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        told: Any = line
        if is_json:
            try:
                told = json.loads(line)
            except ValueError as error:
                raise BadFile(path, f"line {number}: {error}") from None
        given = told.get("prompt") if isinstance(told, dict) else told
        if not isinstance(given, str) or not given.strip():
            raise BadFile(path, f"line {number}: got {given!r:.60}, allowed is a text, or an object with 'prompt'")
        out.append(
            Prompt(given[:MAX_CHARS], str(told.get("family", path.name)) if isinstance(told, dict) else path.name)
        )
    if not out:
        raise BadFile(path, "has no prompts")
    return list(dict.fromkeys(out))


def _rows(path: Path, text: str, bare: bool) -> Iterable[Any]:
    if ".csv" in path.name:
        return csv.reader(io.StringIO(text)) if bare else csv.DictReader(io.StringIO(text))
    return map(json.loads, text.splitlines()) if ".jsonl" in path.name else text.splitlines()


def _unique(rows: Iterable[Any], look: Callable[[Any], str], name: str, path: Path) -> list[Prompt]:
    found: dict[str, None] = {}
    try:
        for row in rows:
            text = look(row).strip()[:MAX_CHARS]
            if text:
                found[text] = None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadFile(path, f"is not as it should be ({type(error).__name__}: {error})") from None
    return [Prompt(text, name) for text in found]
