"""Known answers of the counter-based random numbers: what every implementation must repeat to the last bit."""

from __future__ import annotations

# (seed, index, position, draw) -> the 64 bits; the number is (bits >> 11) * 2^-53.
KNOWN: tuple[tuple[tuple[int, int, int, int], int], ...] = (
    ((0, 0, 0, 0), 0x2130748AAAC80268),
    ((1, 2, 3, 0), 0x12588D809DCE88A7),
    ((2**63 - 1, 7, 123456, 5), 0x0372FD76DC322A63),
)
