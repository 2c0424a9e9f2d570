"""`[cluster]`: what is refused, when there is a cluster at all, and what the command makes of its flags."""

from __future__ import annotations

import argparse
import asyncio
import os

import pytest

from millstream.cli import serve
from millstream.cluster.config import ClusterConfig, RayConfig
from millstream.core.errors import ConfigError, UnknownName
from millstream.core.registry import Choice
from millstream.serve.api import cluster_of


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"replicas": 0}, "cluster.replicas"),
        ({"check_s": 0.0}, "cluster.check_s"),
        ({"suspect_s": 2.0, "lost_s": 1.0}, "cluster.lost_s"),
        ({"min_replicas": 3, "max_replicas": 2}, "cluster.max_replicas"),
    ],
)
def test_what_cannot_be_is_named(given, named):
    with pytest.raises(ConfigError, match=named):
        ClusterConfig(**given)


@pytest.mark.parametrize("given", [{"num_cpus": -1.0}, {"num_cpus": 1.5}, {"object_store_bytes": 1000}])
def test_what_ray_would_refuse_is_refused_before(given):
    with pytest.raises(ConfigError, match=r"cluster\.ray"):
        RayConfig(**given)


def test_there_is_a_cluster_where_there_may_be_two_engines_or_ray_is_asked_for():
    assert not ClusterConfig().wanted
    assert ClusterConfig(replicas=2).wanted
    assert ClusterConfig(autoscaler=Choice("any")).wanted
    assert ClusterConfig(ray=RayConfig("local")).wanted
    assert ClusterConfig(replicas=2).most == 2
    assert ClusterConfig(replicas=2, max_replicas=5).most == 5


def tree(*words):
    parser = argparse.ArgumentParser()
    serve.arguments(parser)
    return serve.tree_of_arguments(parser.parse_args(["smollm2-135m", *words]))


def test_the_flags_of_the_command_say_how_many_and_by_which_router():
    shown = serve.check(tree("--replicas", "3", "--router", "session", "--set", "cluster.lost_s=5"))["cluster"]
    assert (shown["replicas"], shown["router"], shown["lost_s"]) == (3, "session", 5)
    assert "cluster" not in serve.check(tree())
    with pytest.raises(UnknownName, match="least-work"):
        serve.check(tree("--replicas", "2", "--router", "least-wrok"))
    with pytest.raises(ConfigError, match="replicas"):
        serve.check(tree("--set", "cluster.replica=2"))


def test_engines_on_one_machine_share_its_cores():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def threads(*words):
        async def made():
            return cluster_of(tree(*words)).backend._make.args[1]["runner"]["threads"]

        return asyncio.run(made())

    assert threads("--replicas", "2") == max(1, cores // 2)
    assert threads("--replicas", "2", "--set", "cluster.ray.num_cpus=3") == 3
    assert threads("--replicas", "2", "--set", "runner.threads=5") == 5
