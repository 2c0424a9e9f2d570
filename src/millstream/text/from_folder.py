"""A tokenizer from a Hugging Face folder: tokenizer.json and the small files beside it.

The JSON is rebuilt so that the library does only what is the same for every piece of text: control tokens are taken out
(they are found by `Tokenizer`), and so is the space that some tokenizers put before the first piece only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from millstream.core.errors import BadFile, Unsupported
from millstream.text.built import cached
from millstream.text.tokenizer import Facts, Special, Tokenizer

_SMALL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.json",
    "chat_template.jinja",
)
_MAX_SMALL_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 512 << 20
_MAX_ID = 1 << 24


def load_folder_tokenizer(folder: str | Path, cache_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a folder with a `tokenizer.json`.

    Reads besides, where they exist: tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json
    (ids that end an answer) and the chat template (chat_template.jinja, chat_template.json, or in tokenizer_config).
    BOS is put in front when tokenizer_config says add_bos_token, or, where it says nothing, when the tokenizer's own
    post-processor does so; one of WordPiece puts its last token behind as well. `cache_dir` keeps the rebuilt tokenizer
    by the checksum of all these files. Raises BadFile for a damaged folder, Unsupported for a tokenizer that is neither
    byte-level nor SentencePiece-like nor WordPiece.
    """
    folder = Path(folder)
    main = folder / "tokenizer.json"
    if not main.is_file():
        others = [n for n in ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt") if (folder / n).is_file()]
        if others:
            raise Unsupported(
                f"{folder}: has {', '.join(others)} but no tokenizer.json, the one form that is read here"
            )
        raise BadFile(folder, "there is no tokenizer.json")
    files = {"tokenizer.json": _bytes(main, _MAX_TOKENIZER_BYTES)}
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            files[name] = _bytes(folder / name, _MAX_SMALL_BYTES)
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return cached(cache_dir, digest.hexdigest(), main, _Folder(folder, files).build)


class _Folder:
    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self.folder = folder
        self.files = files
        self.main = folder / "tokenizer.json"

    def build(self) -> tuple[str, Facts]:
        spec = self.json("tokenizer.json")
        config = self.json("tokenizer_config.json")
        model = _dict(spec.get("model"))
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind not in ("BPE", "Unigram", "WordPiece"):
            raise Unsupported(f"{self.main}: tokenizer model {kind!r}; there are: BPE, Unigram, WordPiece")
        vocab = self.vocab(model)
        added = self.added(spec, config)
        specials = {
            token["content"]: Special(token["id"], bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in added
            if token.get("special") and token["content"]
        }
        size = 1 + max([*vocab.values(), *(token["id"] for token in added)], default=-1)
        if not 0 < size <= _MAX_ID:
            raise BadFile(self.main, f"token ids reach {size - 1}, allowed are 0 to {_MAX_ID - 1}")
        ids = {**vocab, **{token["content"]: token["id"] for token in added}}
        spelling, strip = self.spelling(spec)
        prefix = self.take_prefix(spec)
        bos_id, eos_id, pad_id, unk_id = (
            self.named(name, config, ids) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        first, last = self.ends_of_post_processor(spec, ids)
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = first is not None
        if add_bos and bos_id is None:
            bos_id = first
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        spec["added_tokens"] = added
        if kind != "Unigram":
            spec["added_tokens"] = plain = [token for token in added if not token.get("special")]
            self.drop_specials(model, specials)
            # The library numbers an added token that the vocabulary lacks by counting, not by its given id.
            model["vocab"] |= {token["content"]: token["id"] for token in plain}
        facts = Facts(
            size=size,
            spelling=spelling,
            specials=specials,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
            unk_id=unk_id,
            add_bos=bool(add_bos) and bos_id is not None,
            prefix=prefix,
            strip_prefix=strip,
            stop_ids=self.stop_ids(eos_id, size),
            chat_templates=self.templates(config),
            last_id=last if kind == "WordPiece" else None,
        )
        return json.dumps(spec, ensure_ascii=False, separators=(",", ":")), facts

    def vocab(self, model: Mapping[str, Any]) -> dict[str, int]:
        vocab = model.get("vocab")
        if isinstance(vocab, list):
            if not all(isinstance(item, list) and item and isinstance(item[0], str) for item in vocab):
                raise BadFile(self.main, "the vocabulary is not a list of pieces and scores")
            return {item[0]: i for i, item in enumerate(vocab)}
        if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
            raise BadFile(self.main, "the vocabulary is not a map from tokens to ids")
        if len(set(vocab.values())) != len(vocab):
            raise BadFile(self.main, "two tokens of the vocabulary have the same id")
        return dict(vocab)

    def added(self, spec: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = {}
        for token in spec.get("added_tokens") or ():
            token_id = _dict(token).get("id")
            if type(token_id) is not int or token_id < 0 or not isinstance(token.get("content"), str):
                raise BadFile(self.main, f"an added token is {token!r}, which lacks an id or a content")
            found[token_id] = dict(token)
        for key, token in _dict(config.get("added_tokens_decoder")).items():
            if key.isdecimal() and int(key) not in found and isinstance(_dict(token).get("content"), str):
                shape = {
                    name: bool(token.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")
                }
                found[int(key)] = {"id": int(key), "content": token["content"], **shape}
        return [found[token_id] for token_id in sorted(found)]

    def spelling(self, spec: Mapping[str, Any]) -> tuple[Literal["byte-level", "sentencepiece", "wordpiece"], bool]:
        """How tokens are written, and whether decoding takes a first space off."""
        decoders = _parts(spec.get("decoder"), "decoders")
        kinds = {part.get("type") for part in decoders}
        if "ByteLevel" in kinds:
            return "byte-level", False
        if "WordPiece" in kinds:
            prefix = next(part.get("prefix", "##") for part in decoders if part.get("type") == "WordPiece")
            if prefix != "##":
                raise Unsupported(f"{self.main}: WordPiece that goes on words with {prefix!r}; there is: '##'")
            return "wordpiece", True
        if "Metaspace" in kinds:
            scheme = next(part for part in decoders if part.get("type") == "Metaspace")
            return "sentencepiece", scheme.get("prepend_scheme", "always") != "never"
        if "Replace" in kinds or "ByteFallback" in kinds:
            return "sentencepiece", any(part.get("type") == "Strip" and part.get("start") for part in decoders)
        names = ", ".join(sorted(str(kind) for kind in kinds)) or "none"
        raise Unsupported(
            f"{self.main}: decoder {names}; there are: ByteLevel, Metaspace, WordPiece, Replace with ByteFallback"
        )

    def take_prefix(self, spec: dict[str, Any]) -> Literal["never", "first"]:
        """Takes "a space before the first piece" out of `spec`; one before every piece the library can do itself."""
        found: Literal["never", "first"] = "never"
        for part in _parts(spec.get("pre_tokenizer"), "pretokenizers"):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
                found = "first"
        return found

    def ends_of_post_processor(self, spec: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[int | None, int | None]:
        """The control tokens that the post-processor puts before and behind a text."""
        for part in _parts(spec.get("post_processor"), "processors"):
            template = part.get("single")
            if part.get("type") == "TemplateProcessing" and isinstance(template, list) and template:
                names = [_dict(_dict(template[place]).get("SpecialToken")).get("id") for place in (0, -1)]
                found = [ids.get(name) if isinstance(name, str) else None for name in names]
                return found[0], found[1] if len(template) > 1 else None
            if part.get("type") == "BertProcessing":
                ends = [part.get(name) for name in ("cls", "sep")]
                found = [ids.get(end[0]) if isinstance(end, list) and end else None for end in ends]
                return found[0], found[1]
        return None, None

    def drop_specials(self, model: dict[str, Any], specials: Mapping[str, Special]) -> None:
        """Control tokens leave the vocabulary, so that no text can merge into one."""
        unk = model.get("unk_token")
        gone = {text for text in specials if text in model["vocab"] and text != unk}
        if model.get("type") == "WordPiece":
            model["vocab"] = {text: i for text, i in model["vocab"].items() if text not in gone}
            return
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise BadFile(self.main, "the merges are missing")
        kept = []
        for merge in merges:
            pair = merge.split(" ", 1) if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise BadFile(self.main, f"a merge is {merge!r}, not two tokens")
            if gone.isdisjoint((pair[0], pair[1], pair[0] + pair[1])):
                kept.append(pair)
        model["merges"] = kept
        model["vocab"] = {text: i for text, i in model["vocab"].items() if text not in gone}

    def named(self, name: str, config: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
        for source in (config, self.json("special_tokens_map.json")):
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                if text not in ids:
                    raise BadFile(self.folder, f"{name} is {text!r}, which is no token")
                return ids[text]
        return None

    def stop_ids(self, eos_id: int | None, size: int) -> frozenset[int]:
        found = set() if eos_id is None else {eos_id}
        for name in ("generation_config.json", "config.json"):
            value = self.json(name).get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            given = {v for v in values if type(v) is int}
            if any(not 0 <= v < size for v in given):
                raise BadFile(
                    self.folder / name, f"eos_token_id is {value!r}, but the vocabulary has ids 0 to {size - 1}"
                )
            found |= given
            if given:
                break
        return frozenset(found)

    def templates(self, config: Mapping[str, Any]) -> dict[str, str]:
        if "chat_template.jinja" in self.files:
            return {"default": self.text("chat_template.jinja")}
        value = self.json("chat_template.json").get("chat_template", config.get("chat_template"))
        if value is None:
            return {}
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
            return dict(value)
        if isinstance(value, list) and all(
            isinstance(_dict(item).get("name"), str) and isinstance(item.get("template"), str) for item in value
        ):
            return {item["name"]: item["template"] for item in value}
        raise BadFile(self.folder, "chat_template is neither a string nor a list of named templates")

    def text(self, name: str) -> str:
        try:
            return self.files[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(self.folder / name, f"not UTF-8: {error}") from None

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty when there is no such file."""
        if name not in self.files:
            return {}
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise BadFile(self.folder / name, f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadFile(self.folder / name, "not a JSON object")
        return value


def _bytes(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise BadFile(path, f"larger than {most >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _parts(value: Any, name: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the one part that stands alone."""
    if not isinstance(value, dict):
        return []
    inner = value.get(name)
    return [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else [value]
