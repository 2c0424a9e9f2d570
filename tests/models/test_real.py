"""The real models, their GGUF files dequantized, against transformers."""

from __future__ import annotations

import pytest
import torch

import oracle
from millstream.models.families.protocol import find_family
from millstream.models.load import load_model
from millstream.models.source import open_source

# float32 on both sides; logits of some tens, sums in another order.
ATOL = 1e-3
LENGTHS = (1, 9, 130)


def prompts(vocab_size):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, min(vocab_size, 40_000), (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def compare(decoder, model, extra=()):
    for prompt in [*prompts(decoder.spec.vocab_size), *extra]:
        # The head over a large vocabulary is most of the work: the last rows see all that came before.
        rows = min(len(prompt), 16)
        want = model(torch.tensor([prompt]), logits_to_keep=rows).logits[0].float().log_softmax(-1)
        hidden = decoder.forward(torch.tensor(prompt), oracle.context(decoder, len(prompt)))
        got = decoder.head(hidden[-rows:]).log_softmax(-1)
        assert (got - want).abs().max() <= ATOL
        best, second = want.topk(2).values.unbind(-1)
        sure = best - second > 2 * ATOL
        assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


@pytest.fixture(autouse=True)
def _one_thread():
    # On cores that are shared, waiting for a second thread costs far more than it gives.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def with_our_weights(transformers, source):
    """Their model, our tensors: reading a GGUF file is slow there, and is compared where the readers are tested."""
    config = transformers.AutoConfig.for_model(**source.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: source.tensor(name) for name in source.tensor_names()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    # Made on "meta", what is computed from the config and not loaded has no values yet.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if hasattr(model.model.embed_tokens, "embed_scale"):
        scale = model.model.embed_tokens.scalar_embed_scale
        model.model.embed_tokens.embed_scale = torch.tensor(scale)
    return model.eval()


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_logprobs_equal_those_of_transformers_on_our_weights(name, real_model, transformers):
    source = open_source(real_model(name))
    # Longer than Gemma's window of 512.
    long = torch.randint(3, 40_000, (560,), generator=torch.Generator().manual_seed(2)).tolist()
    compare(load_model(source, cached=False).decoder, with_our_weights(transformers, source), [long])


@pytest.mark.large
def test_logprobs_of_the_large_model_equal_those_of_transformers(real_model, transformers):
    source = open_source(real_model("qwen2.5-coder-1.5b"))
    compare(load_model(source, cached=False).decoder, with_our_weights(transformers, source))


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_logprobs_equal_those_of_transformers_reading_the_same_file(name, real_model, transformers):
    path = real_model(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    compare(load_model(open_source(path), cached=False).decoder, model.eval())


# Qwen's file stores its head again, quantized otherwise than the embedding.
COUNTS = {"smollm2-135m": 134_515_008, "gemma3-270m": 268_098_176, "qwen2.5-coder-1.5b": 1_777_088_000}


@pytest.mark.parametrize("name", COUNTS)
def test_the_spec_of_a_file_counts_its_parameters(name, real_model):
    config = open_source(real_model(name)).config
    assert find_family(config).spec(config).num_parameters == COUNTS[name]
