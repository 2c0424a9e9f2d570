"""A model written as a Hugging Face folder is the same model, for transformers and for us."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from peers.export_hf import INDEX, export  # noqa: E402
from peers.install import NotInstalled, found_llama_cpp, found_python  # noqa: E402
from peers.launch import Bench, prepare  # noqa: E402

import real  # noqa: E402
from millstream.core.errors import UnknownName  # noqa: E402
from millstream.models.source import open_source  # noqa: E402

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A llama of two layers with random weights, with a tokenizer of single bytes that has control tokens."""
    import tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ("<s>", "</s>", "<|im_end|>")
    ids = {token: place for place, token in enumerate((*special, *alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"})
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(ids), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(folder) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_transformers_computes_the_same_from_the_export(tiny, tmp_path, shard_bytes):
    made = export(str(tiny), tmp_path / "model", "float32", shard_bytes)
    assert (made / INDEX).is_file() == (shard_bytes < 1 << 30)
    torch.testing.assert_close(logits(made), logits(tiny), atol=0, rtol=0)


def test_weights_are_rounded_to_the_dtype_asked_for(tiny, tmp_path):
    made = export(str(tiny), tmp_path / "model")
    source, rounded = open_source(tiny), open_source(made)
    names = [name for name in source.tensor_names() if name != "lm_head.weight"]
    assert sorted(rounded.tensor_names()) == sorted(names)
    for name in names:
        assert rounded.stored_type(name) == "BF16"
        assert torch.equal(rounded.tensor(name), source.tensor(name).bfloat16().float())
    assert json.loads((made / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_goes_with_it_control_tokens_too(tiny, tmp_path):
    made = export(str(tiny), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    plain = transformers.AutoTokenizer.from_pretrained(tiny)
    for text in ("Hello, world", "Grüße <|im_end|> x", "<s>a</s>"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == plain(text, add_special_tokens=False)["input_ids"]
    assert theirs.decode(theirs("Grüße")["input_ids"], skip_special_tokens=True) == "Grüße"
    assert theirs.eos_token == "<|im_end|>" and theirs.eos_token_id == plain.eos_token_id


def test_what_is_there_is_not_written_again_and_a_half_is_never_left(tiny, tmp_path):
    made = export(str(tiny), tmp_path / "model")
    stamp = (made / "config.json").stat().st_mtime_ns
    assert export(str(tiny), tmp_path / "model") == made and (made / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(UnknownName, match="bfloat17"):
        export(str(tiny), tmp_path / "other", "bfloat17")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_gguf_file_gives_the_tokenizer_that_we_use(tmp_path):
    path = real.model_path("smollm2-135m")
    from peers.export_hf import write_tokenizer

    from millstream.models.opened import open_model

    ours = open_model(str(path)).tokenizer()
    write_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The 3 quick foxes' café\n\n  jumped — 12,345 times!"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs("<|im_start|>user\nHi<|im_end|>")["input_ids"] == ours.encode(
        "<|im_start|>user\nHi<|im_end|>", parse_special=True
    )
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_engines_that_are_not_installed_say_how_to_get_them(tmp_path):
    assert found_python(tmp_path, "vllm") is None and found_llama_cpp(tmp_path) is None
    bench = Bench("smollm2-135m", 2, 256, 4, (1,), tmp_path)
    for name in ("vllm", "llama.cpp", "openvino"):
        with pytest.raises(NotInstalled, match=f"peers.install {name}"):
            prepare(name, bench)
    ours = prepare("millstream-float32", bench)
    assert ours.setup["weights"] == "dense" and ours.setup["max_batch"] == 4
