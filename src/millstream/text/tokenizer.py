"""Text <-> token ids for one model, over the `tokenizers` library.

The library object below holds no control tokens at all. Text is cut at their spellings here, and only when the caller
asks for that (`parse_special`); so text that merely spells `<|im_end|>` can never become the control token, nothing has
to be switched per call, and one object serves all threads.

Lone surrogates (half of a UTF-16 pair, which JSON can smuggle into a Python string) have no UTF-8 form and are refused
with BadRequest rather than replaced: a replaced prompt is not the prompt that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal

from tokenizers import Tokenizer as Backend

from millstream.core.errors import BadRequest
from millstream.text.detokenizer import Detokenizer
from millstream.text.vocabulary import Vocabulary

SPACE_MARK = "▁"
# Longer texts are cut into tokens with the GIL given back; for shorter ones another thread costs more than it gives.
ALONE_CHARS = 4096
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Special:
    """A control token: its id, and whether its match in text swallows the white space beside it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What a tokenizer is, beside its vocabulary and merges.

    `spelling` says how tokens are written: "byte-level" (GPT-2's printable alphabet of bytes), "sentencepiece" (U+2581
    for a space, <0xXX> for a byte) or "wordpiece" (## before what goes on a word). `prefix` says before which pieces of
    text a space is put: none, the first if it begins the text (and does not begin with a space), or each one, at the
    start or after a control token. `strip_prefix`: decoding takes that space off again. `last_id` stands behind every
    text as BOS stands before it.
    """

    size: int
    spelling: Literal["byte-level", "sentencepiece", "wordpiece"]
    specials: Mapping[str, Special] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    prefix: Literal["never", "first", "each"] = "never"
    strip_prefix: bool = False
    stop_ids: frozenset[int] = frozenset()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    last_id: int | None = None


class Tokenizer:
    """Text <-> ids. `backend` must hold no control tokens; `facts.specials` has them."""

    def __init__(self, backend: Backend, facts: Facts) -> None:
        self._backend = backend
        self.facts = facts
        self.vocab_size = facts.size
        self.special_ids = frozenset(s.id for s in facts.specials.values())
        self.bos_id, self.eos_id, self.pad_id = facts.bos_id, facts.eos_id, facts.pad_id
        self.add_bos, self.last_id = facts.add_bos, facts.last_id
        self.stop_ids = facts.stop_ids
        self.chat_templates = facts.chat_templates

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, {self.facts.spelling}, {len(self.special_ids)} control tokens)"

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, or None for a model without one."""
        return self.chat_templates.get("default")

    @property
    def strip_prefix(self) -> bool:
        """Whether the first space of a decoded text is an artefact of the tokenizer and is taken off."""
        return self.facts.strip_prefix

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Id -> bytes for the engine; costs nothing until it is asked for an id."""
        return Vocabulary(self.vocab_size, self._lookup_bytes, self.special_ids, self._cut)

    @cached_property
    def splitter(self) -> SpecialSplitter:
        return SpecialSplitter(self.facts.specials)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Ids of `text`.

        `add_bos`: True puts the BOS in front, False does not, None follows the model's rule (and does not double a BOS
        that `parse_special` text already begins with); where a token stands behind every text, it comes with the BOS.
        `parse_special`: spellings of control tokens become their ids; else they are text like any other. Raises
        BadRequest when `text` is no str or holds a lone surrogate, or when `add_bos` is True and the model has no BOS.
        """
        check_text("text", text)
        if parse_special:
            ids = self._encode_parsed(text)
        else:
            ids = self._encode_plain(text, first=True)
        return self._framed(ids, add_bos, parse_special)

    def encode_batch(
        self, texts: Sequence[str], *, add_bos: bool | None = None, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise BadRequest("texts", texts, "a list of str")
        for i, text in enumerate(texts):
            check_text(f"texts[{i}]", text)
        if parse_special:
            return [self._framed(self._encode_parsed(text), add_bos, True) for text in texts]
        ready = [self._prefixed(text, True) for text in texts]
        found = self._backend.encode_batch(ready, add_special_tokens=False)
        return [self._framed(list(encoding.ids), add_bos, False) for encoding in found]

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Ids of a text already cut into plain strings and control ids. No BOS is added; strings are never parsed."""
        ids: list[int] = []
        first = True
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            elif segment:
                ids += self._encode_plain(segment, first=first)
            first = False
        return ids

    def says_something(self, ids: Sequence[int]) -> bool:
        """Whether the ids of a text hold more than the tokens that stand before and behind every text."""
        return any(token not in (self.bos_id, self.last_id) for token in ids)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Ids of two texts as one prompt, the model's last token behind each: what a cross-encoder scores.

        Raises BadRequest as `encode` and `join_pair`.
        """
        return self.join_pair(self.encode(first), self.encode(second))

    def join_pair(self, first: Sequence[int], second: Sequence[int]) -> list[int]:
        """Ids of two texts, each as `encode` gives them, as one prompt.

        Raises BadRequest for a model without a token that stands behind every text.
        """
        if self.last_id is None:
            raise BadRequest("texts", "a pair", "one text: this model has no token that tells two apart")
        return [*first, *(second[1:] if self.bos_id is not None and second[0] == self.bos_id else second)]

    def decode(self, ids: Sequence[int], skip_special: bool = True, *, continuation: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves control tokens out.

        `continuation`: the ids go on after others, so a leading space is part of the text even where the tokenizer puts
        one before every text (SentencePiece). Raises BadRequest for an id that does not exist.
        """
        stream = Detokenizer(self, skip_special, continuation=continuation)
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token. Raises BadRequest out of range."""
        return self.vocabulary.token_bytes(token_id)

    def id_of(self, text: str) -> int | None:
        """The id of the token spelled `text`: a control token's spelling, else a piece as the vocabulary writes it."""
        special = self.facts.specials.get(text)
        if special is not None:
            return special.id
        found: int | None = self._backend.token_to_id(text)
        return found

    def is_byte_token(self, token_id: int) -> bool:
        """Whether this is one of SentencePiece's 256 single-byte tokens."""
        if self.facts.spelling != "sentencepiece" or token_id in self.special_ids:
            return False
        piece = self._backend.id_to_token(token_id)
        return piece is not None and BYTE_TOKEN.fullmatch(piece) is not None

    def spelling_of(self, token_id: int) -> str:
        """How the vocabulary writes a token (`Ġthe`, `▁the`, `<0x0A>`, `<eos>`); '' for an id that has no token."""
        special = self._special_spellings.get(token_id)
        if special is not None:
            return special
        found: str | None = self._backend.id_to_token(token_id)
        return found or ""

    @cached_property
    def _special_spellings(self) -> dict[int, str]:
        return {special.id: text for text, special in self.facts.specials.items()}

    @cached_property
    def _user_defined(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    def _lookup_bytes(self, token_id: int) -> bytes:
        special = self._special_spellings.get(token_id)
        if special is not None:
            return special.encode("utf-8")
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.facts.spelling == "wordpiece":
            return (piece[2:] if piece.startswith("##") else " " + piece).encode("utf-8")
        if self.facts.spelling == "sentencepiece":
            byte = BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode("utf-8")
        if token_id in self._user_defined:
            return piece.encode("utf-8")
        alphabet = byte_alphabet()
        try:
            return bytes([alphabet[char] for char in piece])
        except KeyError:
            return piece.encode("utf-8")

    def _cut(self, text: str) -> list[int]:
        return self._encode_plain(text, first=self.facts.prefix == "each")

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        if not text:
            return []
        ready = self._prefixed(text, first)
        if len(ready) <= ALONE_CHARS:
            return list(self._backend.encode(ready, add_special_tokens=False).ids)
        # Of a single text the library holds the GIL until it is through, of several it does not: 3 MB stopped every
        # other thread for 1.2 s, and so for 0.02 s. Ids are the same; "fast" leaves out offsets, which nobody reads.
        return list(self._backend.encode_batch_fast([ready], add_special_tokens=False)[0].ids)

    def _prefixed(self, text: str, first: bool) -> str:
        prefix = self.facts.prefix
        if not text or prefix == "never":
            return text
        if prefix == "each":
            return " " + text
        # The library's Metaspace puts no second space before one that is there, and none before an added token.
        if not first or text[0] in (" ", SPACE_MARK) or text.startswith(self._added_spellings):
            return text
        return " " + text

    @cached_property
    def _added_spellings(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._backend.get_added_tokens_decoder().values())

    def _encode_parsed(self, text: str) -> list[int]:
        return self.encode_segments(self.splitter.split(text))

    def _framed(self, ids: list[int], add_bos: bool | None, parsed: bool) -> list[int]:
        wanted = self.add_bos if add_bos is None else add_bos
        if wanted:
            if self.bos_id is None:
                if add_bos:
                    raise BadRequest("add_bos", True, "False: this model has no BOS token")
            elif not (add_bos is None and parsed and ids and ids[0] == self.bos_id):
                ids = [self.bos_id, *ids]
            if self.last_id is not None and not (add_bos is None and parsed and ids[-1:] == [self.last_id]):
                ids = [*ids, self.last_id]
        return ids


class SpecialSplitter:
    """Finds control-token spellings in text: the leftmost, and of those that begin there the longest."""

    def __init__(self, specials: Mapping[str, Special]) -> None:
        self._specials = {text: special for text, special in specials.items() if text}
        by_first: dict[str, set[int]] = {}
        for text in self._specials:
            by_first.setdefault(text[0], set()).add(len(text))
        self._lengths = {char: sorted(lengths, reverse=True) for char, lengths in by_first.items()}
        chars = "".join(re.escape(char) for char in self._lengths)
        self._start = re.compile(f"[{chars}]") if chars else None

    def matches(self, text: str, *, overlapping: bool = False) -> Iterator[tuple[int, int, Special]]:
        """(start, end, token) of each spelling; `overlapping` also gives those that begin inside another."""
        if self._start is None:
            return
        at = 0
        while found := self._start.search(text, at):
            start = found.start()
            at = start + 1
            for length in self._lengths[text[start]]:
                special = self._specials.get(text[start : start + length])
                if special is not None:
                    yield start, start + length, special
                    if not overlapping:
                        at = start + length
                    break

    def split(self, text: str) -> list[str | int]:
        """`text` as plain strings and control ids, in order. No string is empty."""
        parts: list[str | int] = []
        done = 0
        for start, end, special in self.matches(text):
            before = text[done:start]
            if special.lstrip:
                before = before.rstrip()
            if before:
                parts.append(before)
            parts.append(special.id)
            done = end
            if special.rstrip:
                rest = text[end:]
                done = end + len(rest) - len(rest.lstrip())
        if done < len(text):
            parts.append(text[done:])
        return parts

    @cached_property
    def prefixes(self) -> frozenset[str]:
        """Proper prefixes of all spellings."""
        return frozenset(text[:n] for text in self._specials for n in range(1, len(text)))

    @cached_property
    def suffixes(self) -> frozenset[str]:
        """Proper suffixes of all spellings."""
        return frozenset(text[n:] for text in self._specials for n in range(1, len(text)))

    @cached_property
    def spellings(self) -> str:
        """All spellings in one string, apart from each other."""
        return "\0".join(self._specials)

    @cached_property
    def longest(self) -> int:
        return max(map(len, self._specials), default=0)


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte: printable Latin-1 stands for itself, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return alphabet


def check_text(param: str, text: object) -> str:
    """`text` itself. Raises BadRequest when it is no str or has no UTF-8 form."""
    if not isinstance(text, str):
        raise BadRequest(param, text, "a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(
            param, text[error.start : error.start + 1], f"valid Unicode (lone surrogate at character {error.start})"
        ) from None
    return text
