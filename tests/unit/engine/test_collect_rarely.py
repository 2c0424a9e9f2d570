"""A process that serves looks for cycles rarely, and not among what was loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import gc, json, sys, weakref
gc.set_threshold(int(sys.argv[1]), 11, 12)
from millstream.engine.process import collect_rarely

class Node: pass
def ring():
    node = Node()
    node.itself = node
    return weakref.ref(node)

before, kept = ring(), Node()
collect_rarely()
gone, frozen = before() is None, gc.get_freeze_count()
after = ring()
gc.collect()
print(json.dumps([gone, frozen > 1000, after() is None, gc.get_threshold()]))
"""


@pytest.mark.parametrize(("young", "told"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_what_is_there_is_kept_out_of_the_search_and_cycles_made_later_are_found(young, told):
    found = subprocess.run([sys.executable, "-c", SCRIPT, str(young)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"[true, true, true, [{told}, 11, 12]]"
