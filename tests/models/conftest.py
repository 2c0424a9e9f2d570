"""Tests of whole models: tiny random ones written by transformers, and the real ones where they are (tests/real.py)."""

from __future__ import annotations

import sys
from pathlib import Path

# The oracle lies one folder up, beside all the suites that use it.
sys.path.insert(0, str(Path(__file__).parents[1]))
