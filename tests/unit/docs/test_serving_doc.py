"""docs/serving.md names the flags, settings, routes and defaults that there are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from millstream.cli.main import parser_of
from millstream.cluster.config import ClusterConfig
from millstream.config.load import build, tree_of
from millstream.config.schema import EngineConfig, LogConfig
from millstream.engine.exits import Exit
from millstream.serve.config import ServeConfig
from millstream.serve.policy import POLICIES, Access
from millstream.serve.supervisor import EmbeddingConfig, SupervisorConfig

DOC = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
TREE = {
    "serve": ServeConfig, "engine": EngineConfig, "supervisor": SupervisorConfig, "log": LogConfig,
    "embedding": EmbeddingConfig, "cluster": ClusterConfig,
}  # fmt: skip
# They are said elsewhere, or say themselves.
ELSEWHERE = {"--help", "--debug"}


def test_the_flags_are_those_of_the_command() -> None:
    there = {flag for action in parser_of("serve")._actions for flag in action.option_strings if flag.startswith("--")}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOC))
    assert named - there == set()
    assert there - named - ELSEWHERE == set()


def test_the_settings_are_there() -> None:
    for path in re.findall(r"`((?:serve|engine|supervisor|log|embedding|cluster)(?:\.[a-z_]+)*)`", DOC):
        at: Any = TREE[path.split(".")[0]]
        for name in path.split(".")[1:]:
            fields = {field.name: field for field in dataclasses.fields(at)}
            assert name in fields, path
            default = fields[name].default_factory
            at = default if default is not dataclasses.MISSING else str


def test_the_defaults_are_these() -> None:
    serve, supervisor = ServeConfig(), SupervisorConfig()
    limits, admission = serve.limits, serve.admission
    for text in (
        f"{limits.header_bytes >> 10} KiB, {limits.headers}, {limits.header_s:g} s",
        f"{limits.body_bytes >> 20} MiB (files {serve.files.file_bytes >> 20} MiB, small routes 64 KiB), "
        f"{limits.body_s:g} s and 1 s more per {limits.body_rate >> 10} KiB",
        f"| {limits.json_depth} | 400 |",
        f"| {serve.api.prompt_bytes >> 20} MiB | 413 |",
        f"| {limits.connections:,}, or what",
        f"| {limits.idle_s:g} s | closed |",
        f"| {limits.stall_s:g} s | cut off",
        f"when {admission.queued_requests:,}\nrequests or {admission.queued_tokens:,} tokens",
        f"`max_wait_s` ({admission.max_wait_s:g} s)",
        f"no step for {supervisor.stall_s:g} s",
        f"no sign of life for {supervisor.silence_s:g} s",
        f"those inside have {supervisor.drain_s:g} s to finish",
    ):
        assert text in DOC, text


def test_the_admin_routes_and_the_open_ones() -> None:
    for (method, path), policy in POLICIES.items():
        if policy.access is Access.ADMIN:
            assert f"| `{method} {path}` |" in DOC
        if policy.access is Access.OPEN and "playground" not in path and path != "/":
            assert f"`{path}`" in DOC


def test_the_example_is_a_configuration() -> None:
    import tomllib

    tree = tomllib.loads(re.findall(r"```toml\n(.*?)```", DOC, re.S)[0])
    tree.pop("model")
    for name, table in tree.items():
        assert tree_of(build(TREE[name], table, name))


def test_every_exit_code_of_a_server_is_told() -> None:
    told = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", DOC, re.M) for code in row.split(",")}
    assert told == {int(code) for code in Exit} - {Exit.ORPHANED}
