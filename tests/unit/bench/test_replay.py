"""A step laid out by hand gives what the model says of each text, however often it is computed."""

from __future__ import annotations

import pytest
import torch

import oracle
import tiny_model
from millstream.bench.replay import Replay
from millstream.core.cache import ALL_LEVELS, EVERY_LEVEL


def text(length: int, seed: int) -> list[int]:
    return torch.randint(3, tiny_model.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_each_row_gets_the_token_after_its_whole_text() -> None:
    decoder = tiny_model.decoder("llama")
    replay = Replay(tiny_model.runner(decoder, attention="auto"), first_block=3)
    root, branch = text(64, 1), text(32, 2)
    trunk = replay.trunk(root)
    further = replay.trunk(branch, trunk)
    owns = [text(length, 10 + length) for length in (1, 7, 16, 17)]
    step = replay.step([(trunk, owns[0]), (further, owns[1]), (trunk, owns[2]), (further, owns[3])])
    texts = [root + owns[0], root + branch + owns[1], root + owns[2], root + branch + owns[3]]
    want = [int(oracle.logprobs(decoder, ids)[-1].argmax()) for ids in texts]
    for levels in (0, ALL_LEVELS, EVERY_LEVEL, 0):
        assert replay.tokens(step, levels) == want
    seconds, seen = replay.attention(step, EVERY_LEVEL)
    mixer = decoder.layers[0].spec.mixer
    assert seconds > 0 and seen.shape == (len(decoder.layers), 4, mixer.heads, mixer.head_dim + 1)
    assert torch.equal(seen, replay.attention(step, 0)[1])
    assert torch.equal(replay.attention(step.first(2), 0)[1], seen[:, :2])
    assert replay.step_s(step.first(1), 0, 2) > 0


def test_what_does_not_fit_is_refused() -> None:
    replay = Replay(tiny_model.runner(tiny_model.decoder("llama"), num_blocks=4), first_block=2)
    with pytest.raises(ValueError, match="not whole blocks"):
        replay.trunk(text(17, 1))
    with pytest.raises(ValueError, match="too few"):
        replay.trunk(text(48, 1))
    with pytest.raises(ValueError, match="one cache group"):
        Replay(tiny_model.runner(tiny_model.decoder("gemma")))
