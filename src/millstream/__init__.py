"""Millstream: one engine for serving language models, in which every technique is a plug-in that can be measured."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.core.errors import BadRequest, MillstreamError
    from millstream.core.request import SamplingParams
    from millstream.engine.llm import LLM, AsyncLLM

# OpenMP threads wait for each other after every product. By default GNU's spin for milliseconds first; when another
# process has the core, that is what the whole step waits for: two engines side by side on two cores then ran at a tenth
# of the speed they have with this, which costs nothing when alone (docs/log.md). Read when torch is first imported.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "2000"

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "BadRequest", "MillstreamError", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "millstream.engine.llm",
    "AsyncLLM": "millstream.engine.llm",
    "SamplingParams": "millstream.core.request",
    "BadRequest": "millstream.core.errors",
    "MillstreamError": "millstream.core.errors",
}


def __getattr__(name: str) -> Any:
    # Lazy: the command line must open in a fraction of a second.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'millstream' has no attribute {name!r}")
