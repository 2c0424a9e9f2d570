"""Texts and real vocabularies for the text room's tests."""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from millstream.text.from_gguf import load_tokenizer
from millstream.text.tokenizer import Tokenizer
from real import model_path

LANGUAGES = """
English: The quick brown fox jumps over the lazy dog; it's what we'd've done, isn't it? I'LL SAY.
Deutsch: Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Français: Voix ambiguë d’un cœur qui, au zéphyr, préfère les jattes de kiwis. L'été, c'est l'Œuvre.
Español: El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia; ¿y tú? ¡Añoraba!
Português: À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso.
Italiano: Pranzo d'acqua fa volti sghembi, perché così è più facile.
Polski: Pchnąć w tę łódź jeża lub ośm skrzyń fig.
Čeština: Příliš žluťoučký kůň úpěl ďábelské ódy.
Magyar: Árvíztűrő tükörfúrógép.
Türkçe: Pijamalı hasta yağız şoföre çabucak güvendi. İIıi
Íslenska: Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.
Tiếng Việt: Con sói nâu nhảy qua con chó lười biếng; Nguyễn Thị Hồng.
Русский: Съешь же ещё этих мягких французских булок, да выпей чаю.
Українська: Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.
Ελληνικά: Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἐν ἀρχῇ ἦν ὁ λόγος
עברית: דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם
العربية: نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. بِسْمِ ٱللَّهِ
فارسی: می‌خواهم «زبان» فارسی را بیاموزم.
हिन्दी: ऋषियों को सताने वाले दुष्ट राक्षसों का विनाश। १२३४५
বাংলা: আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।
தமிழ்: யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்
ไทย: เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน
ქართული: ვეპხის ტყაოსანი შოთა რუსთაველი
Հայերեն: Բոլոր մարդիկ ծնվում են ազատ ու հավասար
አማርኛ: ሰማይ አይታረስ ንጉሥ አይከሰስ።
日本語: いろはにほへと ちりぬるを。カタカナとｶﾀｶﾅ、漢字。１２３
中文: 我能吞下玻璃而不伤身体。敏捷的棕色狐狸跳过懒狗，價值￥１００。
한국어: 다람쥐 헌 쳇바퀴에 타고파. 각
ᏣᎳᎩ: ᎣᏏᏲ
""".strip().split("\n")

SYMBOLS = [
    "",
    " ",
    "a",
    "\n",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin, 🇯🇵🇩🇪 flags, 1️⃣ keycap, 🧑🏿‍🚀🫠",
    "e\u0301 vs é, n\u0303, a\u0308\u0323, Z̸̢͝a̷l̶g̴o̵, \u1112\u1161\u11ab",
    "   leading, trailing   ",
    "a" + " " * 70 + "b" + "\t" * 40 + "c" + "\n" * 50 + "d \n \n\n  \t\n x",
    " \u00a0\u2003\u3000\u200b\u2028\u2029\u0085 spaces of all kinds\r\n\r\r\n",
    "0 1 12 123 1234 12345 3.14159e-10 1,000,000 0xDEADBEEF ½ ² ① Ⅷ ٣٤ 1st 2nd",
    "https://user:pw@example.org:8080/a/b.html?q=%E2%9C%93&x=[1]#frag mail@example.com C:\\dir\\file.txt",
    "\x00\x01\x07\x08\x1b[31mred\x1b[0m\x7f\x80\x9f\ufeff\ufffd\ufdd0\uffff\U0010ffff\ue000",
    "▁sentence▁▁piece ▁ mark ▁▁▁ <0x0A><0xFF> Ġbyte Ċ level",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒻𝒶𝓃𝒸𝓎 🅰 ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ≠ ± ∑ √ ∞ ← ↑ → ␀ ▓ ■ ﷽ ﬁ ﬀ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 3,
    "lololololol hahahaha ---===### !!!??? ...... ''''\"\"\"\" ((())) {{}} $$$",
]

CODE = [
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>10}"  # comment\n\n\nclass A(B):\n\tpass\n',
    '#include <stdio.h>\nint main(void) {\r\n\tfor (int i = 0; i < 10; ++i) printf("%d\\n", i);\r\n}\n',
    "SELECT a.*, COUNT(*) FROM `t` AS a WHERE x <> 'it''s' GROUP BY 1 HAVING n >= 2;\n-- end",
    '{"key": [1, 2.5, null, true], "nested": {"a\\u00e9": "\\n"}}',
    "<html><body><h1>Title</h1><table><tr><td>1</td></tr></table><br/></body></html>",
    'fn main() { let v: Vec<&\'static str> = vec!["a"]; println!("{:?}", v.iter().map(|x| x.len()).sum::<usize>()); }',
]

SPELLED = [
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "a<|im_end|>b <|im_end|> c<|im_end|><|im_end|>",
    "<bos><eos><pad><unk><start_of_turn>user\nx<end_of_turn>\n<mask>[multimodal]<unused0><unused6241>",
    "<s>[INST] a [/INST] b</s><|eot_id|><|begin_of_text|>",
    "<|im_<|im_end|>end|> <|im_end| > <<|im_end|>>",
    "<tool_call>{}</tool_call><|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
]

CORPUS = [*LANGUAGES, *SYMBOLS, *CODE, *SPELLED, "\n".join(LANGUAGES)]


@functools.cache
def metadata_of(name: str) -> Mapping[str, Any]:
    path = model_path(name)
    try:
        from millstream.models.gguf import read_gguf
    except ImportError:
        import gguf

        fields = gguf.GGUFReader(path).fields
        return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    found: Mapping[str, Any] = read_gguf(path).metadata
    return found


def small_bpe(pre: str = "gpt-2") -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE with 900 tokens, trained here."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = ["<tool_call>", "</tool_call>", "｜mark｜"]
    types = [1] * len(tokens) + [3] * len(special) + [4] * len(added) + [5]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special, *added, "[PAD]"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def small_spm(add_space_prefix: bool) -> tuple[dict[str, Any], Any]:
    """GGUF metadata of a SentencePiece BPE with 1,200 pieces, trained here, and sentencepiece's own tokenizer of it."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*LANGUAGES, *CODE]),
        model_writer=written,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_space_prefix,
        user_defined_symbols=["▁▁", "▁▁▁▁", "\n", "\n\n", "<h1>", "</h1>"],
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return metadata_of_spm(written.getvalue(), add_space_prefix), sp


def metadata_of_spm(proto: bytes, add_space_prefix: bool) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    pieces = [(p.piece.replace("▁", " ") if p.type == 4 else p.piece, p.score, p.type) for p in model.pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": model.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": model.trainer_spec.eos_id,
        "tokenizer.ggml.unknown_token_id": model.trainer_spec.unk_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def small_tokenizer(kind: str) -> Tokenizer:
    """ "bpe", "spm" (a space before the text) or "spm-plain" (none)."""
    return load_tokenizer(small_bpe() if kind == "bpe" else small_spm(kind == "spm")[0])


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    return load_tokenizer(metadata_of(name), path=f"{name}.gguf")


def shared_texts() -> list[str]:
    """Public texts in many languages, where MILLSTREAM_DATA names the folder that has them."""
    folder = os.environ.get("MILLSTREAM_DATA")
    path = Path(folder) / "lm_multilingual" / "udhr.jsonl.gz" if folder else None
    if path is None or not path.is_file():
        pytest.skip("MILLSTREAM_DATA does not name a folder with lm_multilingual/udhr.jsonl.gz")
    texts: list[str] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts += json.loads(line)["paragraphs"]
    return texts


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture
def real_tokenizer() -> Callable[[str], Tokenizer]:
    """Name -> the real model's tokenizer, built once a run."""
    return tokenizer_of
