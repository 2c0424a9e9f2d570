"""Every table that a server keeps between requests says what bounds it: a new one without an entry fails the build.

Looked for are attributes of objects in the server, the text layer and the engine that begin as an empty dict or set.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import millstream

ROOT = Path(millstream.__file__).parent
MAKERS = {"dict", "defaultdict", "OrderedDict", "set", "Counter"}

INSIDE = "what is inside: entries leave with their requests, which the gate, the seats or the queue bound"
ONE = "belongs to one request or one run, and is bounded with its body or its file"
CODE = "names come from code or configuration"
KEYS = "at most one entry an API key"

BOUNDS = {
    "engine/engine.py Engine._deadline_of": INSIDE,
    "engine/engine.py Engine._groups": INSIDE,
    "engine/engine.py Engine.counters": CODE,
    "engine/process.py EngineServer._clients": "MAX_CLIENTS connections",
    "engine/process.py EngineServer.counters": CODE,
    "engine/process.py _Client.inside": INSIDE,
    "engine/remote.py RemoteEngine._asks": INSIDE,
    "engine/remote.py RemoteEngine._by_request": INSIDE,
    "engine/remote.py RemoteEngine._feeds": CODE,
    "engine/remote.py RemoteEngine._recent": "a fixed number, the oldest leaves first",
    "engine/remote.py RemoteEngine._streams": INSIDE,
    "serve/admission.py Admission._queue": INSIDE,
    "serve/admission.py Admission._seen": KEYS,
    "serve/admission.py Admission._tenants": KEYS,
    "serve/admission.py Admission._waiting_of": KEYS,
    "serve/anthropic/events.py WholeMessage.message": ONE,
    "serve/auth.py Keyring._remembered": "MAX_REMEMBERED, the one not used for longest leaves first",
    "serve/batch_run.py BatchRun._order": ONE,
    "serve/batches.py Batches._paused": "batches that run, of which there are num_batches",
    "serve/batches.py Batches._running": "num_batches",
    "serve/door.py Salts._known": KEYS,
    "serve/families.py Family._known": "512 combinations of labels, none from a request",
    "serve/families.py Gauge.values": "as Family._known",
    "serve/families.py Histogram.counts": "as Family._known",
    "serve/families.py Histogram.sums": "as Family._known",
    "serve/families.py Summary.values": "as Family._known",
    "serve/observatory.py Call._outputs": ONE,
    "serve/observatory.py Call._prompts": ONE,
    "serve/observatory.py Observatory._failed": CODE,
    "serve/openai/reading.py Counts._outputs": ONE,
    "serve/openai/reading.py Counts._prompts": ONE,
    "serve/policy.py Table._fixed": CODE,
    "serve/policy.py Table._patterns": CODE,
    "serve/policy.py Table.entries": CODE,
    "serve/responses/live.py LiveResponses._ended": "MAX_ENDED, the oldest leaves first",
    "serve/responses/live.py LiveResponses._live": "MAX_PER_OWNER of each key",
    "serve/supervisor.py Supervisor._children": CODE,
    "serve/supervisor.py Supervisor._health": CODE,
    "serve/supervisor.py Supervisor._were_loaded": CODE,
    "serve/timeline.py Timelines._by_engine_id": "as Timelines._kept",
    "serve/timeline.py Timelines._kept": "max_requests and max_bytes, the one not asked about for longest leaves first",
    "serve/upload.py _Form._headers": ONE,
    "serve/upload.py _Form.fields": ONE,
    "text/grammar/compiler.py GrammarCompiler._asked": "CompileLimits.waiting grammars",
    "text/tools/calls.py CallObject._seen": ONE,
}


def tables() -> Iterator[str]:
    for room in ("serve", "text", "engine"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for cls in ast.walk(ast.parse(path.read_text())):
                if isinstance(cls, ast.ClassDef):
                    for name in sorted(set(_attributes(cls))):
                        yield f"{path.relative_to(ROOT)} {cls.name}.{name}"


def _attributes(cls: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(cls):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign) else None
        for target in targets:
            own = isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
            if own and value is not None and _is_empty_table(value):
                yield target.attr


def _is_empty_table(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict):
        return not value.keys
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") in MAKERS and not value.args


def test_every_table_says_what_bounds_it():
    found = set(tables())
    assert found - BOUNDS.keys() == set(), "say what bounds it, in BOUNDS, or make it an Lru"
    assert BOUNDS.keys() - found == set(), "there is no such table any more"
