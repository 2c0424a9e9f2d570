"""Meters, one a file; and those that an engine has which was told of none."""

from __future__ import annotations

from millstream.core.registry import Choice


def usual(step_tokens: int, max_rows: int) -> tuple[Choice, ...]:
    """Steps of a fixed number of tokens, so many sequences at once, blocks on demand."""
    return (
        Choice("splitfuse", {"budget": step_tokens}),
        Choice("seats", {"max_rows": max_rows}),
        Choice("kv-blocks"),
    )
