"""Bad input at the API: a typed error that says what is wrong and what is allowed, and nobody else is harmed."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from millstream.core.errors import (
    BadFile,
    BadRequest,
    ConfigError,
    EngineClosed,
    MillstreamError,
    ModelError,
    UnknownModel,
    UnknownName,
    Unsupported,
)
from millstream.core.request import SamplingParams
from millstream.engine.llm import LLM

WORDS = "the mill stood at a bend of this stream and its wheel turned day and night for all who came by"
# One thread: a model this small only waits for a second one.
SMALL = {"cache": {"blocks": 8, "block_size": 16}, "runner": {"threads": 1}}
WIDTH, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 32, 4, 2, 48, 2, 96


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILLSTREAM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def write_model(folder: Path, shards: int = 1) -> Path:
    """A sound Hugging Face folder: a random llama of two layers and a byte-level tokenizer trained on a sentence."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (vocab, WIDTH), "lm_head": (vocab, WIDTH), "model.norm": (WIDTH,)}
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj": (kv, WIDTH) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj": (INNER, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (WIDTH, INNER)}
        shapes |= {f"{layer}.{n}_layernorm": (WIDTH,) for n in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(4)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def edit(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM(str(write_model(tmp_path_factory.mktemp("model"))), **SMALL) as found:
        yield found


def greedy(max_tokens: int = 8, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 1, **more})


@pytest.fixture
def unharmed(llm):
    """What two requests say before the test, they say after it."""

    def say():
        outs = llm.generate(["the mill", [5, 6, 7, 8]], greedy())
        return [(out.outputs[0].token_ids, out.outputs[0].finish_reason) for out in outs]

    before = say()
    assert [end for _, end in before] == ["length", "length"]
    yield llm
    assert say() == before
    assert llm.thread.call(lambda engine: len(engine.scheduler.live)) == 0
    llm.thread.call(lambda engine: engine.scheduler.ledger.check())


# -- models


@pytest.mark.parametrize("name", ["smollm2-135n", "gema3-270m", "no/such/folder", "/no/such/file.gguf", "", "a b c"])
def test_an_unknown_model_is_told_with_those_that_exist(name):
    with pytest.raises(UnknownModel) as caught:
        LLM(name)
    assert "smollm2-135m" in str(caught.value) or name.startswith(("/", "no/")) or not name


def test_the_nearest_name_of_a_model_is_offered():
    with pytest.raises(UnknownModel, match=r"nearest is 'smollm2-135m'"):
        LLM("smollm2-135n")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_model(tmp_path / "m", shards=3)
    with LLM(str(folder), **SMALL) as llm:
        assert llm.generate("the mill", greedy(2))[0].outputs[0].finish_reason == "length"
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadFile, match=r"model-00002-of-00003\.safetensors"):
        LLM(str(folder))


def test_a_folder_without_weights_or_tokenizer_or_config_says_so(tmp_path):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        folder = write_model(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ModelError, match=r"safetensors|tokenizer|config"):
            LLM(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_safetensors_are_damaged_files(tmp_path, keep):
    folder = write_model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFile, match=r"model\.safetensors"):
        LLM(str(folder))


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: struct.pack("<Q", 1 << 62) + data[8:],
        lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
        lambda data: data[:8] + b"\xff" * 64 + data[72:],
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
        lambda data: data.replace(b"lm_head.weight", b"lm_hand.weight", 1),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        lambda data: data.replace(b"[32,32]", b"[32,99]", 1),
    ],
    ids=["header of exabytes", "header beyond the end", "no json", "type", "name", "offset", "shape"],
)
def test_lying_safetensors_are_typed_errors(tmp_path, lie):
    folder = write_model(tmp_path / "m")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert lie(data) != data
    path.write_bytes(lie(data))
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        LLM(str(folder))


def small_gguf(path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    keys = {"block_count": LAYERS, "embedding_length": WIDTH, "feed_forward_length": INNER, "context_length": CONTEXT}
    for key, value in {**keys, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([f"t{i}" for i in range(40)])
    writer.add_tensor("token_embd.weight", torch.zeros(40, WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_truncated_gguf_files_are_damaged_files(tmp_path):
    whole = small_gguf(tmp_path / "whole.gguf").read_bytes()
    for keep in (0, 3, 4, 20, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"{keep}.gguf"
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=path.name):
            LLM(str(path))


def test_lying_gguf_files_are_typed_errors(tmp_path):
    whole = small_gguf(tmp_path / "whole.gguf").read_bytes()
    lies = {
        "magic": b"GGML" + whole[4:],
        "version": whole[:4] + struct.pack("<I", 99) + whole[8:],
        "tensors": whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:],
        "keys": whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:],
        "string": whole[:24] + struct.pack("<Q", 1 << 50) + whole[32:],
        "arch": whole.replace(b"llama", b"blama"),
        "a model without layers": whole,
    }
    for name, data in lies.items():
        path = tmp_path / f"{name.replace(' ', '-')}-lie.gguf"
        path.write_bytes(data)
        with pytest.raises(ModelError, match=path.name):
            LLM(str(path))


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(Unsupported, match="pickle"):
        LLM(str(path))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model_type": "lama"}, Unsupported, "lama"),
        ({"hidden_size": 0}, ModelError, "hidden_size"),
        ({"hidden_size": "32"}, ModelError, "hidden_size"),
        ({"num_key_value_heads": 3}, ModelError, "num_key_value_heads"),
        ({"vocab_size": -5}, ModelError, "vocab_size"),
        ({"vocab_size": 10**9}, ModelError, "vocab_size"),
        ({"num_hidden_layers": 3}, ModelError, "layers.2|missing"),
        ({"intermediate_size": 49}, ModelError, "shape"),
        ({"rope_scaling": {"rope_type": "spiral"}}, ModelError, "spiral|rope"),
        ({"hidden_act": "wish"}, ModelError, "wish"),
        ({"mystery_knob": 4}, ModelError, "mystery_knob"),
    ],
)
def test_wrong_values_in_a_models_config_are_named(tmp_path, changes, error, said):
    folder = edit(write_model(tmp_path / "m"), **changes)
    with pytest.raises(error, match=said):
        LLM(str(folder))


# -- engine options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": {"blocks": 0}}, "cache.blocks"),
        ({"cache": {"block_size": 0}}, "cache.block_size"),
        ({"cache": {"bytes": "lots"}}, "cache.bytes"),
        ({"cache": {"bytes": 10}}, "cache.bytes"),
        ({"cache": {"byte": "1GiB"}}, "bytes"),
        ({"cache": {"kv": "plane"}}, "plain"),
        ({"cache": {"prefix": "radish"}}, "radix"),
        ({"sched": {"policies": ["fcsf"]}}, "fcfs"),
        ({"sched": {"policies": []}}, "sched.policies"),
        ({"sched": {"meters": ["seats"]}}, "kv-blocks"),
        ({"sched": {"step_tokens": 0}}, "sched.step_tokens"),
        ({"sched": {"max_rows": -1}}, "sched.max_rows"),
        ({"sched": {"preemption": "forget"}}, "recompute"),
        ({"runner": {"plans": 3}}, "runner.plans"),
        ({"runner": {"threads": 0}}, "runner.threads"),
        ({"runner": {"attention": "flash"}}, "flash"),
        ({"runner": {"ops": "fast"}}, "runner.ops|ops"),
        ({"dtype": "float31"}, "float32"),
        ({"max_context": 10**6}, "max_context"),
        ({"max_context": 1}, "max_context"),
        ({"max_context": "long"}, "max_context"),
        ({"cashe": {}}, "cache"),
        ({"seed": "lucky"}, "seed"),
    ],
    ids=str,
)
def test_wrong_options_are_named_before_anything_runs(llm, options, said):
    with pytest.raises((ConfigError, UnknownName), match=said):
        LLM(llm.model, **options)


# -- requests


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": 1000}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"logit_bias": {3: 101}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
    ],
    ids=str,
)
def test_sampling_values_out_of_bounds_are_named_with_what_is_allowed(values, param):
    with pytest.raises(BadRequest, match="allowed is") as caught:
        SamplingParams(**values)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "at least one token"),
        ([], "prompt"),
        ([-1], "token ids from 0 to"),
        ([10**6], "token ids from 0 to"),
        ([2**70], "token ids from 0 to"),
        ([1, 2.5], "integers"),
        ([1, "a"], "integers"),
        ([True, 2], "integers"),
        (b"bytes", "prompt"),
        (17, "prompt"),
        (None, "prompt"),
        ({"text": "x"}, "prompt_token_ids"),
        ({"prompt_token_ids": [-3]}, "token ids from 0 to"),
        ({"prompt_token_ids": []}, "prompt"),
        ([5] * CONTEXT, "at most"),
        ([5] * 10_000, "at most"),
        ("the mill " * 500, "at most"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_prompts_are_refused_and_nobody_is_harmed(unharmed, prompt, said):
    with pytest.raises(BadRequest, match=said) as caught:
        unharmed.generate([[5, 6], prompt], greedy())
    assert "prompts[1]" in caught.value.param
    with pytest.raises(BadRequest):
        list(unharmed.stream(prompt))
    # A text that is only scored needs no room for an answer.
    if prompt != [5] * CONTEXT:
        with pytest.raises(BadRequest, match=said):
            unharmed.score([[5, 6], prompt])


@pytest.mark.parametrize("call", ["generate", "score"])
@pytest.mark.parametrize("prompts", [17, None, 3.5, b"x"])
def test_what_is_no_prompt_at_all_is_refused(unharmed, call, prompts):
    with pytest.raises(BadRequest, match=r"prompts|texts"):
        getattr(unharmed, call)(prompts)


def test_no_prompts_give_no_outputs(unharmed):
    assert unharmed.generate([]) == [] and unharmed.score([]) == []


def test_token_ids_of_sampling_params_must_be_in_the_vocabulary(unharmed):
    for values in ({"logit_bias": {10**6: 1.0}}, {"stop_token_ids": [10**6]}):
        with pytest.raises(BadRequest, match="token ids from 0 to"):
            unharmed.generate("the mill", greedy(**values))


def test_a_prompt_and_its_answer_must_fit_the_context(unharmed):
    fits = unharmed.generate([[5] * (CONTEXT - 8)], greedy(8))[0]
    assert len(fits.outputs[0].token_ids) == 8
    with pytest.raises(BadRequest, match=r"max_tokens.*at most 8"):
        unharmed.generate([[5] * (CONTEXT - 8)], greedy(9))
    open_end = unharmed.generate([[5] * (CONTEXT - 8)], greedy(None))[0]
    assert len(open_end.outputs[0].token_ids) == 8 and open_end.outputs[0].finish_reason == "length"


def test_params_must_be_one_or_one_for_each_prompt(unharmed):
    with pytest.raises(BadRequest, match="one for each of 2"):
        unharmed.generate(["a", "b"], [greedy()] * 3)
    for wrong in (5, "greedy", {"temperature": 0}, [greedy(), None], [greedy(), {"temperature": 0}]):
        with pytest.raises(BadRequest, match="sampling_params"):
            unharmed.generate(["a", "b"], wrong)


def test_bad_chats_are_refused(unharmed):
    for messages in ([{"role": "user"}], [{"role": 5, "content": "x"}], ["hello"], "hello", None, 7, [[]], [None]):
        with pytest.raises(BadRequest, match="messages"):
            unharmed.chat(messages, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(MillstreamError, match="template"):
        unharmed.chat([{"role": "user", "content": "hi"}])


def test_beam_values_out_of_bounds_are_refused(unharmed):
    for values in (
        {"beam_width": 0},
        {"beam_width": 10**6},
        {"beam_width": 2.5},
        {"beam_width": "wide"},
        {"length_penalty": float("nan")},
        {"length_penalty": "long"},
        {"early_stopping": "no"},
    ):
        with pytest.raises(ConfigError, match=next(iter(values)).removeprefix("beam_")):
            unharmed.beam_search("the mill", **values)
    with pytest.raises(BadRequest, match="max_tokens"):
        unharmed.beam_search("the mill", max_tokens=0)


@pytest.mark.parametrize(
    "given",
    [
        {"adapter": "unheard-of"},
        {"adapter": 3},
        {"decode": "beam"},
        {"priority": "high"},
        {"kind": "generate"},
        {"cache_salt": 5},
        {"tenant": None},
        {"slo": 0.5},
        {"hints": {"expected_output_len": 4}},
        {"program": "p"},
    ],
    ids=str,
)
def test_wrong_request_fields_are_refused_before_the_scheduler_sees_them(unharmed, given):
    with pytest.raises(BadRequest, match=next(iter(given))):
        unharmed.generate("the mill", greedy(), **given)


def test_a_decode_method_that_does_not_exist_is_named(unharmed):
    from millstream.core.registry import Choice

    with pytest.raises(UnknownName, match="autoregressive"):
        unharmed.generate("the mill", greedy(), decode=Choice("autoregresive"))


def test_text_that_is_no_unicode_is_refused(unharmed):
    with pytest.raises(BadRequest, match="Unicode"):
        unharmed.generate("half of a pair: \ud800", greedy())


def test_a_closed_engine_says_so(llm):
    other = LLM(llm.model, **SMALL)
    other.close()
    other.close()
    with pytest.raises(EngineClosed):
        other.generate("the mill", greedy())


# -- faults inside


def outputs(llm, prompts, params=None):
    outs = llm.generate(prompts, params or greedy(10))
    return [(out.outputs[0].token_ids, out.outputs[0].finish_reason, out.outputs[0].error) for out in outs]


PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 4, [40, 41]]
MARK = 77  # a token that only the request to be broken has in its prompt


def test_a_fault_in_the_forward_pass_of_one_row_ends_that_request_only(unharmed, monkeypatch):
    alone = [outputs(unharmed, [prompt])[0] for prompt in PROMPTS]
    decoder = unharmed.assembled.built.runner.decoder
    forward = type(decoder).forward

    def broken(self, tokens, step):
        if bool((tokens == MARK).any()):
            raise ValueError("this row is cursed")
        return forward(self, tokens, step)

    monkeypatch.setattr(type(decoder), "forward", broken)
    found = outputs(unharmed, [*PROMPTS[:2], [8, MARK, 8], *PROMPTS[2:]])
    assert found[2][1] == "error" and "cursed" in found[2][2] and not found[2][0]
    assert [*found[:2], *found[3:]] == alone


def test_logits_that_are_nan_for_one_row_end_that_request_only(unharmed, monkeypatch):
    alone = [outputs(unharmed, [prompt])[0] for prompt in PROMPTS]
    decoder = unharmed.assembled.built.runner.decoder
    embed, head = type(decoder).embed, type(decoder).head
    marked = {}

    def watch(self, tokens):
        x = embed(self, tokens)
        marked["row"] = x[(tokens == MARK)]
        return torch.where((tokens == MARK)[:, None], torch.full_like(x, float("nan")), x)

    monkeypatch.setattr(type(decoder), "embed", watch)
    # The last prompt token is the marked one: its logits are not numbers.
    found = outputs(unharmed, [*PROMPTS[:2], [8, 8, MARK], *PROMPTS[2:]])
    assert found[2][1] == "error" and "not finite" in found[2][2]
    assert [*found[:2], *found[3:]] == alone
    monkeypatch.setattr(type(decoder), "embed", embed)

    # And later on: in the midst of a batch the head gives no number for one row, once. It is computed anew.
    batches = 0

    def failing(self, x):
        nonlocal batches
        logits = head(self, x)
        batches += logits.shape[0] > 1
        if batches == 4:
            batches += 1
            logits[1, 3] = float("nan")
        return logits

    monkeypatch.setattr(type(decoder), "head", failing)
    counters = unharmed.assembled.engine.counters
    retries = counters["cold_retries"]
    assert outputs(unharmed, PROMPTS) == alone
    assert counters["cold_retries"] == retries + 1


def test_what_a_broken_request_computed_is_not_found_by_a_later_one(unharmed, monkeypatch):
    decoder = unharmed.assembled.built.runner.decoder
    prompt = [*range(50, 90), 3]
    want = outputs(unharmed, [prompt])
    unharmed.thread.call(lambda engine: engine.scheduler.ledger.index.clear())
    embed = type(decoder).embed

    def broken(self, tokens):
        x = embed(self, tokens)
        return x * float("nan") if bool((tokens >= 50).any()) else x

    monkeypatch.setattr(type(decoder), "embed", broken)
    assert outputs(unharmed, [prompt])[0][1] == "error"
    monkeypatch.setattr(type(decoder), "embed", embed)
    assert outputs(unharmed, [prompt]) == want


def test_one_of_n_broken_samples_leaves_its_siblings(unharmed, monkeypatch):
    params = SamplingParams(n=3, seed=4, max_tokens=8, ignore_eos=True)
    want = [out.token_ids for out in unharmed.generate([PROMPTS[1]], params)[0].outputs]
    decoder = unharmed.assembled.built.runner.decoder
    head, calls = type(decoder).head, 0

    def failing(self, x):
        nonlocal calls
        logits = head(self, x)
        if logits.shape[0] == 3:
            calls += 1
            if calls == 3:
                logits[2] = float("nan")
        elif calls >= 3 and logits.shape[0] == 1:
            # The one that is computed anew comes to its logits by itself.
            logits[0] = float("nan")
            calls = -10_000
        return logits

    monkeypatch.setattr(type(decoder), "head", failing)
    found = unharmed.generate([PROMPTS[1]], params)[0].outputs
    assert sorted(out.finish_reason for out in found) == ["error", "length", "length"]
    for out, tokens in zip(found, want, strict=True):
        assert out.token_ids == tokens[: len(out.token_ids)]


def test_scores_that_are_not_finite_are_a_fault_of_that_text(unharmed, monkeypatch):
    from millstream.core.errors import RequestFault

    decoder = unharmed.assembled.built.runner.decoder
    want = [score.logprob for score in unharmed.score(PROMPTS)]
    head = type(decoder).head
    # Of many positions at once, as no sampled token is: the engine's own test of the model is one.
    broken = float("nan")
    monkeypatch.setattr(type(decoder), "head", lambda self, x: head(self, x) * (broken if x.shape[0] > 1 else 1.0))
    with pytest.raises(RequestFault, match="not finite"):
        unharmed.score(PROMPTS)
    monkeypatch.setattr(type(decoder), "head", head)
    assert [score.logprob for score in unharmed.score(PROMPTS)] == pytest.approx(want, abs=1e-4)


def test_an_abandoned_stream_leaves_nothing_behind(unharmed):
    for pieces in (0, 1, 3):
        stream = unharmed.stream("the mill", greedy(40))
        for _ in range(pieces):
            next(stream)
        stream.close()
