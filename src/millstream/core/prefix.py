"""Names of prefixes: what stands for the beginning of a prompt where its tokens must not or need not be seen."""

from __future__ import annotations

from collections.abc import Sequence


def names(tokens: Sequence[int], block: int, salt: str = "") -> tuple[int, ...]:
    """The names of the whole blocks of `tokens`, in order: a hash of each block and of all before it.

    Two prompts begin with the same k blocks exactly where their first k names are equal, but for collisions of 64-bit
    hashes. Those of other salts share none. Good for one process: hashes of salts differ between processes.
    """
    found: list[int] = []
    name = hash(salt) if salt else 0
    for start in range(0, len(tokens) - block + 1, block):
        name = hash((name, *tokens[start : start + block]))
        found.append(name)
    return tuple(found)
