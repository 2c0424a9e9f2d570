"""The laws run the engine of tests/unit/engine, and hold what computes against the naive generator."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for folder in (TESTS, TESTS / "unit" / "engine"):
    sys.path.insert(0, str(folder))
