""" "auto" is settled by a pure function that gives reasons; settings that do not go together are told at once."""

from __future__ import annotations

import pytest

from millstream.config.load import build
from millstream.config.schema import EngineConfig
from millstream.core.cache import ALL_LEVELS
from millstream.core.errors import ConfigError, UnknownName
from millstream.engine.check import check
from millstream.engine.resolve import Machine, resolve, with_knee
from millstream.models.families.protocol import find_family

SHAPE = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
SPEC = find_family(SHAPE).spec(SHAPE)
MACHINE = Machine("cpu", 3, 8 << 30)


def page_bytes(group, block_size):
    return 1000 * block_size


def settle(tree=None, machine=MACHINE):
    return resolve(build(EngineConfig, tree or {}), SPEC, machine, page_bytes)


def test_everything_auto_is_settled_with_a_reason_and_twice_the_same():
    found = settle()
    assert found == settle()
    assert (found.threads, found.plans, found.max_context) == (3, 1, 2048)
    assert found.blocks["full"] * found.block_size >= found.max_context and found.host_blocks == {"full": 0}
    names = {decision.name for decision in found.decisions}
    assert {"runner.threads", "runner.plans", "model.max_context", "cache.bytes", "sched.meters"} <= names
    assert "runner.shared_prefix" in names and found.prefix_levels == ALL_LEVELS
    assert all(decision.value and decision.reason for decision in found.decisions)


def test_what_is_given_is_kept_and_needs_no_reason():
    tree = {
        "runner": {"plans": 2, "threads": 1, "shared_prefix": "off"},
        "cache": {"kv": "plain", "block_size": 32, "blocks": 64},
        "sched": {"step_tokens": 17, "max_rows": 5, "meters": ["kv-blocks"]},
        "model": {"max_context": 100},
    }
    found = settle(tree)
    assert (found.plans, found.threads, found.block_size, found.max_context) == (2, 1, 32, 100)
    assert found.prefix_levels == 0
    assert found.blocks == {"full": 64} and [meter.name for meter in found.meters] == ["kv-blocks"]
    assert {decision.name for decision in found.decisions} <= {"cache.host_bytes"}


def test_a_measured_knee_sets_the_step():
    found = settle(machine=Machine("cpu", 2, 8 << 30, 96, "measured today"))
    assert found.meters[0].options == {"budget": 96}
    assert any(
        decision.name == "sched.step_tokens" and "measured today" in decision.reason for decision in found.decisions
    )


def test_a_knee_measured_after_the_pages_were_made_changes_the_steps_and_nothing_else():
    given = {"sched": {"max_rows": 7}}
    later = with_knee(settle(given), 96, "measured today")
    assert later == settle(
        given, machine=Machine(MACHINE.device, MACHINE.cores, MACHINE.memory_bytes, 96, "measured today")
    )


def test_a_small_budget_shortens_an_auto_context_and_refuses_a_given_one():
    small = {"cache": {"bytes": 64 * 1000 * 4}}
    found = settle(small)
    assert found.blocks == {"full": 4} and found.max_context == 256
    with pytest.raises(ConfigError, match="max_context is 2000"):
        settle({**small, "model": {"max_context": 2000}})


def test_swap_gets_host_blocks():
    found = settle({"sched": {"preemption": "swap"}, "cache": {"blocks": 10, "block_size": 64}})
    assert found.host_blocks == {"full": 10}
    for room in (0, 1000):
        with pytest.raises(ConfigError, match=f"cache.host_bytes of {room} bytes have no room"):
            settle({"sched": {"preemption": "swap"}, "cache": {"blocks": 10, "block_size": 64, "host_bytes": room}})


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        ({"runner": {"threads": 0}}, "runner.threads"),
        ({"runner": {"plans": 3}}, "runner.plans"),
        ({"runner": {"shared_prefix": "on"}}, "runner.shared_prefix"),
        ({"model": {"max_context": 1}}, "model.max_context"),
        ({"model": {"max_context": 4096}}, "2 to 2048"),
        ({"cache": {"block_size": 0}}, "cache.block_size"),
        ({"cache": {"blocks": 0}}, "cache.blocks"),
        ({"cache": {"bytes": 1000}}, "needs 2"),
        ({"cache": {"bytes": "lots"}}, "cache.bytes"),
        ({"sched": {"step_tokens": 0}}, "sched.step_tokens"),
        ({"sched": {"max_rows": 0}}, "sched.max_rows"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(tree, word):
    with pytest.raises(ConfigError, match=word):
        settle(tree)


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({"model": {"dtype": "float8"}}, UnknownName, ["model.dtype", "float32"]),
        ({"sched": {"preemption": "swop"}}, UnknownName, ["sched.preemption", "'swap'"]),
        ({"runner": {"shared_prefix": "tre"}}, UnknownName, ["runner.shared_prefix", "'tree'"]),
        ({"sched": {"policies": []}}, ConfigError, ["sched.policies", "fcfs"]),
        ({"sched": {"policies": ["fcsf"]}}, UnknownName, ["fcsf", "'fcfs'"]),
        ({"sched": {"meters": ["seats"]}}, ConfigError, ["kv-blocks"]),
        ({"sched": {"meters": ["prefill-first", "kv-blocks"]}}, ConfigError, ["needs policy:prefill-first"]),
        ({"decode": {"name": "beam", "widht": 3}}, ConfigError, ["widht", "'width'"]),
        ({"decode": {"name": "beam", "width": 0}}, ConfigError, ["width"]),
        ({"cache": {"prefix": {"name": "none", "x": 1}}}, ConfigError, ["takes no options"]),
        ({"cache": {"kv": "plane"}}, UnknownName, ["'plain'"]),
    ],
)
def test_choices_that_do_not_exist_or_do_not_go_together_are_told_before_loading(tree, error, words):
    with pytest.raises(error) as caught:
        check(build(EngineConfig, tree))
    for word in words:
        assert word in str(caught.value)


def test_the_defaults_go_together():
    check(EngineConfig())
    check(
        build(
            EngineConfig, {"sched": {"policies": ["prefill-first", "fcfs"], "meters": ["prefill-first", "kv-blocks"]}}
        )
    )


def test_automatic_kv_follows_the_weights():
    def kv(tree):
        found = settle(tree)
        return found.config.cache.kv.name, [one.value for one in found.decisions if one.name == "cache.kv"]

    assert kv({}) == ("plain", ["plain"])
    assert kv({"model": {"weights": "blocks"}}) == ("int8", ["int8"])
    assert kv({"model": {"weights": "blocks"}, "cache": {"kv": "plain"}}) == ("plain", [])


def test_a_way_to_keep_weights_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match=r"nearest.*blocks"):
        check(build(EngineConfig, {"model": {"weights": "bloks"}}))
    with pytest.raises(ConfigError, match="float32"):
        check(build(EngineConfig, {"model": {"weights": "blocks", "dtype": "bfloat16"}}))
