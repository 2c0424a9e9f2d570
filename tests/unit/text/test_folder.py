"""Tokenizers from Hugging Face folders, against the library that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import tiny_encoder
from conftest import CHATML, CODE, CORPUS, LANGUAGES
from millstream.core.errors import BadFile, BadRequest, Unsupported
from millstream.text.from_folder import load_folder_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator([*LANGUAGES, *CODE], trainer)
    return backend


def metaspace(scheme: str) -> Backend:
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", *SPECIAL, *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=pieces, show_progress=False)
    backend.train_from_iterator([*LANGUAGES, *CODE], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(spec))


def legacy() -> Backend:
    backend = metaspace("never")
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def write(folder: Path, backend: Backend, **files: Any) -> Path:
    backend.add_special_tokens([AddedToken("<|pad|>", special=True, rstrip=True)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        name = name.replace("__", ".")
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


KINDS = {
    "byte-level": byte_level,
    "first": lambda: metaspace("first"),
    "always": lambda: metaspace("always"),
    "never": lambda: metaspace("never"),
    "legacy": legacy,
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_library_with_and_without_control_tokens(kind: str, tmp_path: Path) -> None:
    backend = KINDS[kind]()
    write(tmp_path, backend)
    ours = load_folder_tokenizer(tmp_path, tmp_path / "cache")
    again = load_folder_tokenizer(tmp_path, tmp_path / "cache")
    for text in [*CORPUS, "<s>a <|pad|>  b<think>c", " <s> x", "<|im_start|>user\nHi<|im_end|>"]:
        backend.encode_special_tokens = False
        assert ours.encode(text, parse_special=True) == backend.encode(text, add_special_tokens=False).ids, text
        backend.encode_special_tokens = True
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
        assert again.encode(text) == ours.encode(text)
        ids = ours.encode(text)
        if kind != "never":
            assert ours.decode(ids, skip_special=False) == backend.decode(ids, skip_special_tokens=False), text


def test_bos_eos_and_templates_come_from_the_files_beside(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    folder = write(
        tmp_path,
        backend,
        tokenizer_config__json={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": CHATML},
        generation_config__json={"eos_token_id": [1, 3]},
        special_tokens_map__json={"pad_token": "<|pad|>"},
    )
    tokenizer = load_folder_tokenizer(folder)
    assert tokenizer.add_bos and tokenizer.encode("a")[0] == tokenizer.bos_id == 0
    assert tokenizer.eos_id == 1 and tokenizer.stop_ids == {1, 3}
    assert tokenizer.pad_id == tokenizer.id_of("<|pad|>") and tokenizer.chat_template == CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "bos_token": "<s>"}))
    (folder / "chat_template.jinja").write_text("from the file")
    tokenizer = load_folder_tokenizer(folder)
    assert not tokenizer.add_bos and tokenizer.bos_id == 0 and tokenizer.chat_template == "from the file"


def test_named_templates_are_kept_by_name(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = write(tmp_path, byte_level(), tokenizer_config__json={"chat_template": templates})
    assert load_folder_tokenizer(folder).chat_templates == {"default": "a", "tool_use": "b"}
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "c"}))
    assert load_folder_tokenizer(folder).chat_templates == {"default": "c"}


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"tokenizer_config__json": "{"}, BadFile, "tokenizer_config.json: not JSON"),
        ({"tokenizer_config__json": "[]"}, BadFile, "not a JSON object"),
        ({"tokenizer_config__json": {"bos_token": "<nope>"}}, BadFile, "'<nope>', which is no token"),
        ({"generation_config__json": {"eos_token_id": 10**7}}, BadFile, "ids 0 to"),
        ({"tokenizer_config__json": {"chat_template": 5}}, BadFile, "chat_template"),
        ({"tokenizer__json": "{}"}, Unsupported, "model None"),
        ({"tokenizer__json": {"model": {"type": "WordLevel", "vocab": {}}}}, Unsupported, "'WordLevel'"),
        (
            {
                "tokenizer__json": {
                    "decoder": {"type": "WordPiece", "prefix": "@@"},
                    "model": {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
                }
            },
            Unsupported,
            "'@@'",
        ),
        ({"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}}, BadFile, "vocabulary"),
        ({"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}}, BadFile, "same id"),
        ({"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": 10**12}, "merges": []}}}, BadFile, "reach"),
        (
            {
                "tokenizer__json": {
                    "decoder": {"type": "ByteLevel"},
                    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]},
                }
            },
            BadFile,
            "cannot be built",
        ),
    ],
)
def test_damaged_folders_are_named(files: dict[str, Any], error: type[Exception], says: str, tmp_path: Path) -> None:
    write(tmp_path, byte_level(), **files)
    with pytest.raises(error, match=says):
        load_folder_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_json_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"no tokenizer\.json"):
        load_folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(Unsupported, match=r"has tokenizer\.model but"):
        load_folder_tokenizer(tmp_path)


def test_wordpiece_is_framed_as_the_library_frames_it(tmp_path: Path) -> None:
    backend = tiny_encoder.tokenizer()
    folder = tiny_encoder.write(tmp_path)
    ours = load_folder_tokenizer(folder, tmp_path / "cache")
    again = load_folder_tokenizer(folder, tmp_path / "cache")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for text in [
        "The cat runs, sleeping!",
        "",
        " ",
        "Ünïted",
        "\u5317\u4eac",
        "cat" * 60,
        "[SEP] is text [UNK]",
        "a\nb",
    ]:
        want = backend.encode(text).ids
        assert ours.encode(text) == again.encode(text) == want, text
        assert ours.encode_batch([text]) == [want]
        assert ours.encode(text, add_bos=False) == want[1:-1]
        assert ours.says_something(want) == (len(want) > 2)
        # Truncated and padded, as the file would have it, nothing is.
        assert len(ours.encode(text * 9)) == len(backend.encode(text * 9).ids)
    assert ours.encode("[CLS] a [SEP]", parse_special=True) == [2, *ours.encode("a", add_bos=False), 3]
    pair = ours.encode_pair("the cat", "a dog")
    assert pair == backend.encode("the cat", "a dog").ids
    assert ours.decode(ours.encode("the catsing")) == "the catsing"
    assert (ours.bos_id, ours.last_id, ours.pad_id) == (2, 3, 0)


def test_only_wordpiece_puts_a_token_behind_a_text(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(end, backend.token_to_id(end)) for end in ("<s>", "</s>")]
    )
    tokenizer = load_folder_tokenizer(write(tmp_path, backend))
    assert tokenizer.encode("a")[0] == 0 and tokenizer.last_id is None and tokenizer.encode("a")[-1] != 1
    with pytest.raises(BadRequest, match="a pair"):
        tokenizer.encode_pair("a", "b")
