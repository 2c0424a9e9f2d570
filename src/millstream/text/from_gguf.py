"""A tokenizer from the metadata of a GGUF file.

Two kinds exist. "gpt2" is byte-level BPE: the file gives merges, and names the pre-tokenizer (how text is cut into
words first) by a short name. "llama" is SentencePiece BPE: the file gives a score for each piece, and any two
neighbours whose join is a piece may merge, the best score first.

Token types (GGUF's numbers): 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from millstream.core.errors import BadFile, Unsupported, nearest
from millstream.text.built import cached
from millstream.text.tokenizer import BYTE_TOKEN, SPACE_MARK, Facts, Special, Tokenizer, byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merging: `patterns` in turn, each on the pieces of the one before."""

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    """A word that is a token is taken as it is, whatever the merges say."""


_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}",), whole_words=True)
_QWEN2 = PreTokenizer((rf"{_WORD}|\p{{N}}|{_REST}",), nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((_GPT2,)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}

END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
        "<|END_OF_TURN_TOKEN|>",
        "</s>",
        "<eos>",
    }
)
"""Control tokens that end an answer of a chat model, under the names that model makers give them."""


def load_tokenizer(
    metadata: Mapping[str, Any],
    cache_dir: str | Path | None = None,
    key: str | None = None,
    *,
    path: str | Path = "GGUF metadata",
) -> Tokenizer:
    """The tokenizer that GGUF `metadata` describes.

    `cache_dir` keeps the finished tokenizer under `key` (the model file's checksum; without one the vocabulary is
    hashed, which takes longer); with both, a warm load does not touch the token arrays. `path` names the file in
    errors. Raises BadFile for metadata that is damaged or contradicts itself, Unsupported for a kind or a
    pre-tokenizer that this build does not know.
    """
    source = _Metadata(metadata, path)
    source.check_kind()
    if cache_dir is not None and key is None:
        key = source.checksum()
    return cached(cache_dir, key or "", path, source.build, source.refresh)


def built_tokenizer(metadata: Mapping[str, Any], path: str | Path) -> tuple[str, Facts]:
    """The same tokenizer as the library's JSON and its facts, for `text.built.save`. Raises as `load_tokenizer`."""
    source = _Metadata(metadata, path)
    source.check_kind()
    return source.build()


class _Metadata:
    """Typed, checked access to the `tokenizer.*` keys."""

    def __init__(self, metadata: Mapping[str, Any], path: str | Path) -> None:
        self.metadata = metadata
        self.path = path

    def check_kind(self) -> None:
        kind = self.text("model")
        if kind not in ("gpt2", "llama"):
            raise Unsupported(
                f"{self.path}: tokenizer model {kind!r}; there are: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
            )
        if kind == "gpt2":
            self.pre_tokenizer()

    def pre_tokenizer(self) -> PreTokenizer:
        name = self.text("pre", "default")
        found = PRE_TOKENIZERS.get(name)
        if found is None:
            close = nearest(name, PRE_TOKENIZERS)
            raise Unsupported(
                f"{self.path}: pre-tokenizer {name!r} is not known"
                + (f"; the nearest is {close!r}" if close else "")
                + f"; there are: {', '.join(sorted(PRE_TOKENIZERS))}"
            )
        return found

    def build(self) -> tuple[str, Facts]:
        tokens = self.strings("tokens")
        if not tokens:
            raise BadFile(self.path, "the vocabulary is empty")
        types = self.types(len(tokens))
        self.check_duplicates(tokens, types)
        specials = {
            token: Special(i)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, UNKNOWN) and token
        }
        byte_level = self.text("model") == "gpt2"
        spec = self.byte_level(tokens, types) if byte_level else self.sentencepiece(tokens, types)
        spelling: Literal["byte-level", "sentencepiece"] = "byte-level" if byte_level else "sentencepiece"
        facts = Facts(size=len(tokens), spelling=spelling, specials=specials)
        return json.dumps(spec, ensure_ascii=False, separators=(",", ":")), self.refresh(facts)

    def refresh(self, facts: Facts) -> Facts:
        """`facts` with all that is read from single values, not from the arrays."""
        spm = facts.spelling == "sentencepiece"
        ids = {name: self.token_id(f"{name}_token_id", facts.size) for name in ("bos", "eos", "eot", "eom")}
        templates = self.templates()
        stop = {i for name, i in ids.items() if name != "bos" and i is not None}
        if templates:
            stop |= {special.id for text, special in facts.specials.items() if text in END_OF_TURN}
        prefix = spm and self.flag("add_space_prefix", True)
        return dataclasses.replace(
            facts,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=self.token_id("padding_token_id", facts.size),
            unk_id=self.token_id("unknown_token_id", facts.size),
            add_bos=self.flag("add_bos_token", spm) and ids["bos"] is not None,
            prefix="each" if prefix else "never",
            strip_prefix=prefix,
            stop_ids=frozenset(stop),
            chat_templates=templates,
        )

    def byte_level(self, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
        vocab = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind not in (CONTROL, UNKNOWN)
        }
        merges: list[tuple[str, str]] = []
        known = frozenset(vocab)
        for n, merge in enumerate(self.strings("merges")):
            left, gap, right = merge.partition(" ")
            if not gap or left not in known or right not in known or left + right not in known:
                raise BadFile(self.path, f"merge {n} is {merge!r}, which is not two tokens whose join is a token")
            merges.append((left, right))
        pre = self.pre_tokenizer()
        alphabet = byte_alphabet()
        if not any(char in known for char in alphabet):
            raise BadFile(self.path, "no token stands for a single byte, so no text can be encoded")
        cuts = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in pre.patterns
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return _spec(
            vocab=vocab,
            merges=merges,
            added=self.user_defined(tokens, types, normalized=False),
            normalizer={"type": "NFC"} if pre.nfc else None,
            pre_tokenizer={"type": "Sequence", "pretokenizers": [*cuts, to_bytes]},
            ignore_merges=pre.whole_words,
        )

    def sentencepiece(self, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
        scores = self.scores(len(tokens))
        unknown = [i for i, kind in enumerate(types) if kind == UNKNOWN]
        unk_id = unknown[0] if unknown else self.token_id("unknown_token_id", len(tokens))
        vocab: dict[str, int] = {}
        pieces: list[int] = []
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == CONTROL and i != unk_id:
                continue
            if kind == BYTE and not BYTE_TOKEN.fullmatch(token):
                raise BadFile(self.path, f"token {i} is a byte token, but is spelled {token!r}, not like '<0x0A>'")
            # Files write a user-defined token's spaces as spaces, while text is matched with the mark in their place.
            spelled = token.replace(" ", SPACE_MARK) if kind == USER_DEFINED else token
            if spelled in vocab:
                raise BadFile(self.path, f"tokens {vocab[spelled]} and {i} are both {spelled!r}")
            vocab[spelled] = i
            if kind == NORMAL:
                pieces.append(i)
        added = self.user_defined(tokens, types, normalized=True)
        return _spec(
            vocab=vocab,
            merges=derive_merges([tokens[i] for i in pieces], [scores[i] for i in pieces]),
            added=added,
            normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            pre_tokenizer=None,
            byte_fallback=any(kind == BYTE for kind in types),
            unk=tokens[unk_id] if unk_id is not None and tokens[unk_id] in vocab else None,
        )

    def user_defined(self, tokens: Sequence[str], types: Sequence[int], normalized: bool) -> list[dict[str, Any]]:
        return [
            {
                "id": i,
                "content": token.replace(" ", SPACE_MARK) if normalized else token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": normalized,
                "special": False,
            }
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == USER_DEFINED and token
        ]

    def check_duplicates(self, tokens: Sequence[str], types: Sequence[int]) -> None:
        if len(set(tokens)) == len(tokens):
            return
        first: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if token in first and types[i] != UNUSED:
                raise BadFile(self.path, f"tokens {first[token]} and {i} are both {token!r}")
            first.setdefault(token, i)

    def templates(self) -> dict[str, str]:
        found: dict[str, str] = {}
        prefix = "tokenizer.chat_template"
        for key in self.metadata:
            name = (
                "default" if key == prefix else key.removeprefix(prefix + ".") if key.startswith(prefix + ".") else ""
            )
            if name:
                value = self.metadata[key]
                if not isinstance(value, str):
                    raise BadFile(self.path, f"{key} is a {type(value).__name__}, not a string")
                found[name] = value
        return found

    def text(self, name: str, default: str | None = None) -> str:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, str):
            raise BadFile(self.path, f"tokenizer.ggml.{name} is " + ("missing" if value is None else "not a string"))
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise BadFile(self.path, f"tokenizer.ggml.{name} is {value!r}, not true or false")
        return value

    def token_id(self, name: str, size: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise BadFile(self.path, f"tokenizer.ggml.{name} is {value!r}, not a token id")
        if not 0 <= (token_id := int(value)) < size:
            raise BadFile(self.path, f"tokenizer.ggml.{name} is {token_id}, but the vocabulary has ids 0 to {size - 1}")
        return token_id

    def array(self, name: str, required: bool = True) -> Sequence[Any] | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None and not required:
            return None
        if value is not None and hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise BadFile(self.path, f"tokenizer.ggml.{name} is " + ("missing" if value is None else "not an array"))
        return value

    def strings(self, name: str) -> list[str]:
        found = list(self.array(name) or ())
        for i, item in enumerate(found):
            if not isinstance(item, str):
                raise BadFile(self.path, f"tokenizer.ggml.{name}[{i}] is a {type(item).__name__}, not a string")
        try:
            "".join(found).encode("utf-8")
        except UnicodeEncodeError:
            raise BadFile(self.path, f"tokenizer.ggml.{name} holds strings that are not UTF-8") from None
        return found

    def types(self, size: int) -> list[int]:
        found = self.array("token_type", required=False)
        if found is None:
            return [NORMAL] * size
        if len(found) != size:
            raise BadFile(self.path, f"{size} tokens, but {len(found)} token types")
        for i, kind in enumerate(found):
            if isinstance(kind, bool) or not hasattr(kind, "__index__") or not NORMAL <= kind <= BYTE:
                raise BadFile(self.path, f"token {i} has type {kind!r}, allowed are 1 to 6")
        return [int(kind) for kind in found]

    def scores(self, size: int) -> list[float]:
        found = self.array("scores") or ()
        if len(found) != size:
            raise BadFile(self.path, f"{size} tokens, but {len(found)} scores")
        for i, score in enumerate(found):
            if isinstance(score, bool) or not hasattr(score, "__float__") or score != score:
                raise BadFile(self.path, f"token {i} has score {score!r}, which is not a number")
        return [float(score) for score in found]

    def checksum(self) -> str:
        digest = hashlib.sha256()
        for key in sorted(self.metadata):
            if not key.startswith("tokenizer."):
                continue
            value = self.metadata[key]
            digest.update(f"\0\0{key}\0".encode())
            if isinstance(value, Sequence) and not isinstance(value, str | bytes):
                value = "\0".join(map(str, value))
            digest.update(str(value).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def derive_merges(pieces: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges, best first, that make rank-ordered BPE cut text as SentencePiece's score-ordered BPE does.

    SentencePiece may join any two neighbours whose join is a piece. Of the many ways to cut one piece in two, at most
    one is ever met: until the last join no merge crosses the piece's border, so the steps inside it do not depend on
    what is around it, and replaying them on the piece alone shows which pair comes last. For Gemma's 255,474 normal
    pieces this leaves 236,246 merges of 513,511, and the finished tokenizer loads in two thirds of the time.
    """
    order = sorted(range(len(pieces)), key=lambda i: (-scores[i], i))
    # The rank is the score's, not the piece's: equal scores merge leftmost first.
    score_of = dict(zip(pieces, scores, strict=True))
    merges: list[tuple[str, str]] = []
    for i in order:
        piece = pieces[i]
        splits = [
            (piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in score_of and piece[n:] in score_of
        ]
        if len(splits) > 1:
            last = _last_join(piece, score_of)
            splits = [last] if last else []
        merges += splits
    return merges


def _last_join(piece: str, score_of: Mapping[str, float]) -> tuple[str, str] | None:
    parts = list(piece)
    while len(parts) > 2:
        best, at = float("-inf"), -1
        for n in range(len(parts) - 1):
            score = score_of.get(parts[n] + parts[n + 1])
            if score is not None and score > best:
                best, at = score, n
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spec(
    *,
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unk: str | None = None,
) -> dict[str, Any]:
    """The `tokenizers` library's JSON of a BPE tokenizer."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": unk is not None,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
