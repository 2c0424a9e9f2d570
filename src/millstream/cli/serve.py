"""Serve a model over HTTP: OpenAI's API, Anthropic's messages, and a playground in the browser.

The server is three processes: this one, which watches over the others, one that computes, and one that answers HTTP.
SIGTERM or Ctrl-C finishes what is inside first, a second one does not.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from millstream.cli.options import MODEL_HELP
from millstream.core.errors import ConfigError, SettingError
from millstream.core.logs import FORMATS, LEVELS

DEFAULT_MODEL = "smollm2-135m"
# Flag, where its value goes in the tree, type, help. Names are vLLM's where it has them.
_FLAGS: Mapping[str, tuple[tuple[str, str, type, str], ...]] = {
    "where to listen": (
        ("--host", "serve.host", str, "an address (default 127.0.0.1); 0.0.0.0 is all"),
        ("--port", "serve.port", int, "default 8000; 0 takes a free one"),
        ("--uds", "serve.uds", str, "listen at a Unix socket of this path instead"),
        ("--root-path", "serve.root_path", str, "what a proxy cuts off the paths"),
        ("--ssl-certfile", "serve.tls.certfile", str, "serve HTTPS with this certificate (PEM)"),
        ("--ssl-keyfile", "serve.tls.keyfile", str, "its key, where it is not in the same file"),
        ("--ssl-ca-certs", "serve.tls.ca_certs", str, "clients must show a certificate of one of these"),
        ("--admin-port", "serve.admin.port", int, "a second listener, on loopback: drain, cache reset, configuration"),
        ("--admin-key", "serve.admin.key", str, "the key of the admin listener, which has none of its own"),
    ),
    "how much": (
        ("--max-queued-requests", "serve.admission.queued_requests", int, "that wait for a first token"),
        ("--max-queued-tokens", "serve.admission.queued_tokens", int, "of prompts that wait for a first token"),
        ("--max-wait", "serve.admission.max_wait_s", float, "seconds; who would wait longer is told to come back"),
        ("--max-connections", "serve.limits.connections", int, "open at once"),
        ("--max-body-bytes", "serve.limits.body_bytes", int, "of one request; files have a limit of their own"),
        ("--max-prompt-bytes", "serve.api.prompt_bytes", int, "of text of one prompt"),
        ("--shutdown-timeout", "supervisor.drain_s", float, "seconds that requests have to finish (default 30)"),
    ),
    "the API": (
        ("--embedding-model", "embedding.model", str, "a second model, for embeddings, rerank and score"),
        ("--otlp-endpoint", "serve.watch.otlp_endpoint", str, "the collector that traces are sent to"),
        ("--folder", "serve.folder", str, "where files, batches and responses are kept"),
        ("--tool-call-parser", "serve.api.tool_parser", str, "how the model writes calls of tools (default auto)"),
        ("--reasoning-parser", "serve.api.reasoning_parser", str, "how the model writes its thinking (default auto)"),
        (
            "--generation-config",
            "serve.api.generation_config",
            str,
            "model (or auto): its own sampling defaults; none (or vllm): not those",
        ),
    ),
    "several engines": (
        ("--replicas", "cluster.replicas", int, "engines behind this server, as Ray actors (default 1, without Ray)"),
        ("--router", "cluster.router", str, "which of them gets a request (default least-work)"),
        ("--ray-address", "cluster.ray.address", str, "of a Ray cluster, auto, or local (default): this server's own"),
    ),
    "the engine": (
        ("--dtype", "engine.model.dtype", str, "of weights and activations (default float32)"),
        ("--weights", "engine.model.weights", str, "dense (default), blocks (as stored in a GGUF file), or a format"),
        ("--max-model-len", "engine.model.max_context", int, "in tokens; at most what the model was made for"),
        ("--max-num-seqs", "engine.sched.max_rows", int, "requests that are computed at once"),
        ("--max-num-batched-tokens", "engine.sched.step_tokens", int, "tokens of one step"),
        ("--scheduling-policy", "engine.sched.policies", str, "which request is next (default fcfs)"),
        ("--block-size", "engine.cache.block_size", int, "tokens of one block of the KV cache"),
        ("--kv-cache-memory-bytes", "engine.cache.bytes", str, "of the KV cache, such as 4GiB"),
        ("--seed", "engine.seed", int, "makes requests without a seed repeatable"),
    ),
}
# Tables and values of the engine that may be written without their `engine.`, as other commands have them.
_OF_ENGINE = ("cache", "sched", "runner", "decode", "seed")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP} (default {DEFAULT_MODEL})")
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML or YAML file: model, [serve], [engine], [cluster], [supervisor]"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="one setting of the tree; may be repeated"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and leave")
    keys = parser.add_argument_group("who is let in")
    keys.add_argument(
        "--api-key", action="append", default=[], metavar="[NAME:]KEY", help="may be repeated; also $MILLSTREAM_API_KEY"
    )
    keys.add_argument("--api-key-file", metavar="FILE", help="one key a line; read again at SIGHUP")
    keys.add_argument("--allow-unauthenticated", action="store_true", help="let everybody in, from everywhere")
    keys.add_argument("--allowed-origins", nargs="+", metavar="ORIGIN", help="pages of browsers that may ask; * is all")
    keys.add_argument("--new-key", metavar="NAME", help="make a key, print it and the line for a key file, and leave")
    keys.add_argument("--hash-key", metavar="NAME", help="ask for a key of your own, print its line, and leave")
    parser.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="what clients call the model (default: its name)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse fields of requests that are not known")
    parser.add_argument("--trust-request-chat-template", action="store_true", help="requests may bring chat templates")
    parser.add_argument("--no-enable-prefix-caching", action="store_true", help="keep no prefixes")
    parser.add_argument("--log-level", dest="log.level", choices=LEVELS, help="the least that is logged (default info)")
    parser.add_argument("--log-format", dest="log.format", choices=FORMATS, help="lines of text (default), or of JSON")
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, path, kind, text in flags:
            metavar = "N" if kind is int else "S" if kind is float else None
            group.add_argument(flag, dest=path, type=kind, metavar=metavar or flag[2:].upper(), help=text)


def run(args: argparse.Namespace) -> int:
    from millstream.engine.exits import Exit
    from millstream.serve.auth import new_key, sealed

    if args.new_key is not None:
        key = new_key()
        line = sealed(f"{args.new_key}:{key}")
        print(f"key   {key}\nline  {line}")
        print(
            "The key is shown this once. The line goes into a file for --api-key-file, or to --admin-key.",
            file=sys.stderr,
        )
        return 0
    if args.hash_key is not None:
        print(sealed(f"{args.hash_key}:{_asked()}"))
        return 0
    tree = tree_of_arguments(args)
    from millstream.config.load import blamed_on

    with blamed_on(args.config):
        checked = check(tree)
    if args.print_config:
        print(json.dumps(checked, indent=2))
        return 0
    if "cluster" in checked and find_spec("ray") is None:
        raise ConfigError(
            "cluster: several engines run on Ray, which is not installed; pip install 'millstream[cluster]'"
        )
    if (taken := _taken(tree)) is not None:
        print(f"millstream: {taken}", file=sys.stderr)
        return Exit.ADDRESS
    _find_model(tree["model"])
    if (second := tree.get("embedding", {}).get("model")) and not _find_model(second):
        raise ConfigError(f"embedding.model: {second} gives no vectors; all-minilm-l6-v2 is one that does")
    from millstream.config.load import log_by
    from millstream.serve.supervisor import supervise

    log_by(tree)
    status: int = supervise(lambda: tree_of_arguments(args))
    return status


def tree_of_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration: defaults, then the file, then --set, then flags. Keys are hashed in it. Raises ConfigError."""
    from millstream.config.load import given_api_keys, merge, parse_sets, read_file
    from millstream.serve.auth import sealed

    tree = merge(
        _in_place(read_file(args.config)) if args.config else {}, _in_place(parse_sets(args.set)), _flags(args)
    )
    tree.setdefault("model", DEFAULT_MODEL)
    if not isinstance(tree["model"], str):
        raise ConfigError("model: got a table; the settings of the model belong in [engine.model]")
    auth = tree.setdefault("serve", {}).setdefault("auth", {})
    keys = auth.get("keys", ())
    keys = [keys] if isinstance(keys, str) else list(keys)
    auth["keys"] = [sealed(key) for key in (*keys, *given_api_keys(), *args.api_key)]
    if (admin := tree["serve"].get("admin")) and admin.get("key"):
        admin["key"] = sealed(admin["key"])
    return tree


def check(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with all defaults in it and without secrets. Raises ConfigError and BadFile."""
    from millstream.cluster.config import ClusterConfig
    from millstream.config.load import build, tree_of
    from millstream.config.schema import EngineConfig, LogConfig
    from millstream.core import registry
    from millstream.serve.auth import entries_of
    from millstream.serve.config import ServeConfig, without_secrets
    from millstream.serve.supervisor import EmbeddingConfig, SupervisorConfig

    known = ("model", "engine", "embedding", "serve", "cluster", "supervisor", "log")
    for name in tree:
        if name not in known:
            from millstream.core.errors import nearest

            close = nearest(name, (*known, *_OF_ENGINE))
            raise SettingError(
                name,
                tree[name],
                f"there is no setting {name!r}" + (f"; the nearest is {close!r}" if close else "") + "; there are: "
                f"{', '.join((*known, *_OF_ENGINE))}",
            )
    serve = build(ServeConfig, tree["serve"], "serve")
    engine = build(EngineConfig, tree.get("engine", {}), "engine")
    embedding = build(EmbeddingConfig, tree.get("embedding", {}), "embedding")
    supervisor = build(SupervisorConfig, tree.get("supervisor", {}), "supervisor")
    cluster = build(ClusterConfig, tree.get("cluster", {}), "cluster")
    serve.check(bool(entries_of(serve.auth)))
    registry.options("router", cluster.router)
    if cluster.autoscaler is not None:
        registry.options("autoscaler", cluster.autoscaler)
    whole = {
        "model": tree["model"],
        "engine": tree_of(engine),
        **({"embedding": tree_of(embedding)} if embedding.model else {}),
        "serve": tree_of(serve),
        **({"cluster": tree_of(cluster)} if cluster.wanted else {}),
        "supervisor": tree_of(supervisor),
        "log": tree_of(build(LogConfig, tree.get("log", {}), "log")),
    }
    shown: dict[str, Any] = without_secrets(whole)
    return shown


def _in_place(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the engine is put there."""
    from millstream.config.load import merge

    out = {name: value for name, value in tree.items() if name not in _OF_ENGINE}
    engine = {name: tree[name] for name in _OF_ENGINE if name in tree}
    if isinstance(out.get("model"), Mapping):
        engine["model"] = out.pop("model")
    return merge(out, {"engine": engine}) if engine else out


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    tree: dict[str, Any] = {}

    def put(path: str, value: Any) -> None:
        at = tree
        *tables, last = path.split(".")
        for table in tables:
            at = at.setdefault(table, {})
        at[last] = value

    for flags in _FLAGS.values():
        for _, path, _, _ in flags:
            if (value := getattr(args, path)) is not None:
                put(path, value)
    for path, given in (
        ("log.level", getattr(args, "log.level")),
        ("log.format", getattr(args, "log.format")),
        ("model", args.model),
        ("serve.auth.file", args.api_key_file),
        ("serve.allowed_origins", args.allowed_origins),
        ("serve.api.model_names", args.served_model_name),
        ("serve.auth.allow_unauthenticated", args.allow_unauthenticated or None),
        ("serve.api.strict", args.strict or None),
        ("serve.api.chat_templates", args.trust_request_chat_template or None),
        ("engine.cache.prefix", "none" if args.no_enable_prefix_caching else None),
    ):
        if given is not None:
            put(path, given)
    return tree


def _taken(tree: Mapping[str, Any]) -> str | None:
    """Why a port or socket cannot be had, None where all can. Raises ConfigError for certificates that are wrong."""
    from millstream.config.load import build
    from millstream.serve.config import ServeConfig
    from millstream.serve.listen import check_tls, places

    config = build(ServeConfig, tree["serve"], "serve")
    check_tls(config.tls)
    for where, listen in places(config):
        try:
            listen().close()
        except OSError as error:
            hint = "; --port takes another one" if error.errno == errno.EADDRINUSE else ""
            return f"{where}: {error.strerror or error}{hint}"
    return None


def _asked() -> str:
    import getpass

    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    return getpass.getpass("key: ")


def _find_model(name: str) -> bool:
    """Downloads it where it is not here, and reads its headers: better now than in a process that is restarted.

    Whether it gives vectors.
    """
    from millstream.cli.output import download_progress, note
    from millstream.models.opened import open_model

    with download_progress(name) as progress:
        return bool(open_model(name, progress=progress, notice=note).spec.vectors)
