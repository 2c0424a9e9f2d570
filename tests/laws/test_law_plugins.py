"""Every plug-in of every point: it says what it is, is found by its name, and takes its options by name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest

from millstream.core import registry
from millstream.core.errors import ConfigError, UnknownName
from millstream.core.registry import Card, Choice

EVERY = [(point, name) for point in registry.points() for name in registry.names(point)]
# Points whose plug-ins may have a half that needs torch.
WITH_TORCH = {"kv", "weights", "decode", "logits", "attention"}


def test_there_are_plugins_at_every_point_but_experiments_which_may_come_later():
    assert {point for point, _ in EVERY} >= set(registry.points()) - {"experiment"}


@pytest.mark.parametrize(("point", "name"), EVERY)
def test_a_card_names_its_file_and_says_what_it_is_in_one_line(point, name):
    card = registry.card(point, name)
    assert isinstance(card, Card) and card.name == name
    assert 0 < len(card.summary) <= 120 and "\n" not in card.summary
    assert card.paper is None or 1 <= card.paper <= 79
    assert card.lossless or card.error, "what loses must say how much"
    for other in (*card.needs, *card.conflicts):
        kind, _, named = other.partition(":")
        assert named in registry.names(kind), f"{other} does not exist"
    assert registry.module(point, name).__doc__


@pytest.mark.parametrize(("point", "name"), EVERY)
def test_a_plugin_has_a_class_in_its_file_or_in_its_halves(point, name):
    module = registry.module(point, name)
    if hasattr(module, "PLUGIN"):
        assert callable(registry.get(point, name)) and registry.get(point, name) is registry.get_device(point, name)
        return
    halves = {info.name for info in pkgutil.iter_modules(module.__path__)} & {"host", "device"}
    assert halves, "a folder without PLUGIN has a host half, a device half or both"
    for half in halves:
        assert callable(importlib.import_module(f"{module.__name__}.{half}").PLUGIN)


@pytest.mark.parametrize(("point", "name"), EVERY)
def test_options_are_frozen_have_defaults_and_are_refused_by_name(point, name):
    config = registry.options(point, Choice(name))
    if config is not None:
        assert dataclasses.is_dataclass(config) and type(config).__dataclass_params__.frozen
        assert type(config).__doc__
        field = dataclasses.fields(config)[0].name
        with pytest.raises(ConfigError, match=field):
            registry.options(point, Choice(name, {field[:-1] + "X": 1}))
    with pytest.raises(ConfigError, match="no_such_option"):
        registry.options(point, Choice(name, {"no_such_option": 1}))


@pytest.mark.parametrize("point", registry.points())
def test_an_unknown_name_lists_the_names_and_the_nearest(point):
    known = registry.names(point)
    with pytest.raises(UnknownName) as caught:
        registry.module(point, "no-such-thing")
    assert caught.value.exist == known and all(name in str(caught.value) for name in known)
    if known:
        with pytest.raises(UnknownName, match="nearest") as caught:
            registry.module(point, known[0][:-1] + "q")
        assert caught.value.nearest in known
    for escape in ("../core", "a.b", "", "__init__", "protocol"):
        with pytest.raises(UnknownName):
            registry.module(point, escape)


@pytest.mark.parametrize("name", registry.names("experiment"))
def test_an_experiment_is_complete_before_it_runs(name):
    from millstream.reproduce.protocol import Experiment

    experiment = registry.get("experiment", name)
    assert issubclass(experiment, Experiment)
    made = experiment()
    assert made.name == name and made.title and len(made.arms) >= 2 and made.metrics
    assert registry.card("experiment", name).paper == made.paper
    for arm in made.arms:
        for use in arm.uses:
            point, _, named = use.partition(":")
            assert named in registry.names(point)
