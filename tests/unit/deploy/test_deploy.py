"""What is deployed fits the server: every metric that is queried exists, times agree, nothing runs as root."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from millstream.cli import serve
from millstream.core.client import Chunk, Load, RequestMetrics, Usage
from millstream.core.errors import ConfigError
from millstream.core.events import Preempted, Stepped
from millstream.core.request import Slo
from millstream.core.sequence import Finish
from millstream.serve.metrics import Metrics
from millstream.serve.observatory import Observatory
from millstream.serve.supervisor import END_S, GRACE_S, SupervisorConfig

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "millstream.json").read_text())
# What Prometheus adds to every series itself.
SCRAPED = {"job", "instance", "namespace", "le", "__name__"}


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Every series of /metrics, once everything that is counted has happened, and its labels."""
    watched = Observatory(Metrics("tiny"))
    metrics = watched.metrics
    call = watched.begin("x", "chat", "/v1/chat/completions")
    call.slo = Slo(1.0, 1.0, 1.0)
    call.heard(Chunk(1, 0, (1, 2), finish=Finish.STOP, usage=Usage(3, 2, 1), metrics=RequestMetrics(0.1, 0.2, 0.3)))
    call.end(200)
    watched.begin("y", "chat", "/v1/chat/completions").end(429, shed="queue_full")
    watched.hear(Stepped(0.0, 1, 0.1, 2, 3, 2, 0, 1, 9, 0.001))
    metrics.hear(Preempted(0.0, None, "recompute"))
    metrics.look_at(SimpleNamespace(losses=0, resumed=0, engine_pid=os.getpid()))
    metrics.loaded(Load(0, 1, 9, 10, {"steps": 1}))
    metrics.describe_cache(block_size=16)
    metrics.http("GET", "/metrics", 200, 0.1, 1, 2)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    if sys.platform != "linux":
        # Where there is no /proc these are not known.
        for name in ("open_fds", "resident_memory_bytes", "cpu_seconds_total"):
            found |= {f"process_{name}": set(), f"millstream_engine_process_{name}": set()}
    return found


def queries() -> list[tuple[str, str]]:
    found = [(panel["title"], t["expr"]) for panel in BOARD["panels"] for t in panel.get("targets", ())]
    found += [(one["name"], one["query"]["query"]) for one in BOARD["templating"]["list"] if one["type"] == "query"]
    scaled = yaml.safe_load((DEPLOY / "kubernetes" / "scaledobject.yaml").read_text())
    return [*found, *((t["type"], t["metadata"]["query"]) for t in scaled["spec"]["triggers"])]


@pytest.mark.parametrize(("where", "query"), queries())
def test_every_metric_and_label_that_is_queried_exists(where, query, series):
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), where
    names = re.findall(r"\b(?:millstream_|vllm:|http_|process_)[a-z0-9_]+", query)
    assert names, f"{where} queries nothing"
    for name in names:
        assert name in series, f"{where}: there is no {name}"
        for selector in re.findall(re.escape(name) + r"\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= series[name] | SCRAPED, f"{where}: {name} has no {labels - series[name] - SCRAPED}"
    known = set().union(*(series[name] for name in names)) | SCRAPED
    for by in re.findall(r"by \(([^)]*)\)", query):
        assert {label.strip() for label in by.split(",")} <= known, where


def test_the_board_is_whole():
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    assert BOARD["uid"] and BOARD["schemaVersion"] >= 36
    variables = {one["name"] for one in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert used - {"__rate_interval", "__all"} <= variables
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"


def documents(kind: str | None = None) -> list[dict]:
    found = [
        document
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]
    return [one for one in found if kind is None or one["kind"] == kind]


def test_every_manifest_is_listed_and_named():
    (listed,) = documents("Kustomization")
    there = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed["resources"]) == there
    for one in documents():
        assert one["apiVersion"] and (one["kind"] == "Kustomization" or one["metadata"]["name"] == "millstream")


def test_selectors_find_what_they_should():
    (deployment,), (service,) = documents("Deployment"), documents("Service")
    (monitor,), (scaled,) = documents("ServiceMonitor"), documents("ScaledObject")
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    (container,) = pod["spec"]["containers"]
    assert port["targetPort"] in {one["name"] for one in container["ports"]}
    assert monitor["spec"]["endpoints"][0]["port"] == port["name"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "two would decide how many servers there are"


def test_probes_and_the_time_to_drain_fit_the_server():
    (deployment,) = documents("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["startupProbe"]["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    startup = container["startupProbe"]
    supervisor = SupervisorConfig()
    assert startup["periodSeconds"] * startup["failureThreshold"] >= supervisor.startup_s
    liveness = container["livenessProbe"]
    # The server's own watchdog is the quicker one.
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > supervisor.silence_s
    before_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = before_s + supervisor.drain_s + GRACE_S + 2 * END_S
    assert pod["terminationGracePeriodSeconds"] > needed
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")) > needed - before_s


def test_nothing_runs_as_root_or_writes_outside_of_its_volumes():
    (deployment,) = documents("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    user = next(line for line in dockerfile() if line[0] == "USER")
    assert user[1] == str(pod["securityContext"]["runAsUser"])


def test_compose_publishes_on_this_machine_only_and_mounts_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        assert set(service.get("depends_on", ())) <= set(compose["services"])
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["server:8000"] and scrape["metrics_path"] == "/metrics"
    for path in (DEPLOY / "grafana" / "provisioning").rglob("*.yaml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1


def dockerfile() -> list[list[str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [shlex.split(line, comments=False) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    lines = dockerfile()
    words = {word for line in lines for word in line}
    assert {"FROM", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "STOPSIGNAL"} <= {line[0] for line in lines}
    for line in lines:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            for source in line[1:-1]:
                assert (ROOT / source).exists(), source
    (package,) = [word for word in words if word.startswith(".[")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(package[2:-1].split(",")) <= set(extras)
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert "*" in kept and {"!src", "!pyproject.toml"} <= set(kept)


def commands() -> dict[str, list[str]]:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]["command"]
    (deployment,) = documents("Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (line,) = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("CMD ")]
    return {
        "image": json.loads(line.removeprefix("CMD ")),
        "compose": [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in compose],
        "kubernetes": container["args"],
    }


@pytest.mark.parametrize("where", ["image", "compose", "kubernetes"])
def test_the_server_takes_its_command_and_lets_nobody_in_unasked(where, tmp_path, monkeypatch):
    name, *words = commands()[where]
    assert name == "serve"
    monkeypatch.delenv("MILLSTREAM_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("acme:a-key-of-acme\n")
    parser = argparse.ArgumentParser()
    serve.arguments(parser)
    args = parser.parse_args([word.replace("/etc/millstream/keys", str(keys)) for word in words])
    if where == "image":
        # Whoever runs it alone says who may ask.
        with pytest.raises(ConfigError, match="no API keys"):
            serve.check(serve.tree_of_arguments(args))
        monkeypatch.setenv("MILLSTREAM_API_KEY", "a-key-of-your-own")
    shown = serve.check(serve.tree_of_arguments(args))
    assert shown["log"]["format"] == "json" and shown["serve"]["host"] == "0.0.0.0"
    assert shown["serve"]["port"] == 8000 and shown["model"] == "smollm2-135m"
    assert shown["serve"]["auth"]["allow_unauthenticated"] == (where == "compose")


def test_the_ray_job_asks_for_what_the_command_and_its_workers_have():
    job, service = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and service["kind"] == "Service"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["millstream", "serve"]
    parser = argparse.ArgumentParser()
    serve.arguments(parser)
    without_keys = [word for word in words[2:] if word != "--api-key-file" and not word.startswith("/etc/")]
    tree = serve.tree_of_arguments(parser.parse_args(without_keys))
    tree["serve"]["auth"]["allow_unauthenticated"] = True
    cluster = serve.check(tree)["cluster"]
    assert cluster["ray"]["address"] == "auto"
    head, (workers,) = job["spec"]["rayClusterSpec"]["headGroupSpec"], job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert float(workers["rayStartParams"]["num-cpus"]) == cluster["ray"]["num_cpus"]
    assert workers["minReplicas"] <= cluster["replicas"] == workers["replicas"] <= workers["maxReplicas"]
    (container,) = head["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == tree["serve"]["port"] and container["readinessProbe"]["httpGet"]["path"] == "/ready"
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in ports
    assert service["spec"]["selector"].items() <= head["template"]["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= workers["template"]["metadata"]["labels"].items()
    keys = head["template"]["spec"]["volumes"][0]["secret"]["items"][0]["path"]
    assert f"{container['volumeMounts'][0]['mountPath']}/{keys}" in words
