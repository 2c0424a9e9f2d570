"""What the machine can do at most, measured: `ceilings.cpp` says how."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from millstream.core.errors import BadRequest
from millstream.ops.cpu import build

KINDS = ("int8", "float32", "bfloat16")
# Far more than any cache that two cores share with few others.
READ_BYTES = 512 << 20
# What one sample takes at least: shorter ones measure the clock.
SAMPLE_S = 0.02


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of some repeats, on `threads` threads. Operations count multiply and add apart.

    `read_bytes_per_s` is of memory far larger than the caches, `resident_bytes_per_s` of `resident_bytes` read again
    and again, which caches may hold a part of. `ops_per_s` has the kinds of KINDS that the machine has instructions
    for, of numbers that lie in the first-level cache.
    """

    threads: int
    read_bytes_per_s: float
    resident_bytes: int
    resident_bytes_per_s: float
    ops_per_s: dict[str, float]

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each, of two measurements of the same."""
        return replace(
            self,
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            resident_bytes_per_s=max(self.resident_bytes_per_s, other.resident_bytes_per_s),
            ops_per_s={kind: max(rate, other.ops_per_s.get(kind, 0.0)) for kind, rate in self.ops_per_s.items()},
        )


def measure_ceilings(threads: int, resident_bytes: int, repeats: int = 5, read_bytes: int = READ_BYTES) -> Ceilings:
    """Raises KernelError where the kernels cannot be compiled, BadRequest for no thread or no byte."""
    for name, value in (("threads", threads), ("resident_bytes", resident_bytes), ("repeats", repeats)):
        if value < 1:
            raise BadRequest(name, value, "an integer from 1")
    library = build.library("ceilings")
    library.millstream_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.millstream_peak.argtypes = [ctypes.c_int64] * 3
    library.millstream_peak_ops.argtypes = [ctypes.c_int64]
    library.millstream_peak_ops.restype = ctypes.c_int64
    # Written, so that every page is memory of its own.
    memory = torch.ones(max(read_bytes, resident_bytes, 1 << 16), dtype=torch.uint8)

    def read(num_bytes: int) -> float:
        num_bytes = max(num_bytes, 1 << 16)
        return num_bytes / _best(lambda: library.millstream_read(memory.data_ptr(), num_bytes, threads), repeats)

    peaks = {}
    for kind, name in enumerate(KINDS):
        if ops := library.millstream_peak_ops(kind):
            rounds = _rounds(lambda n, kind=kind: library.millstream_peak(kind, n, threads))
            seconds = _best(lambda kind=kind, n=rounds: library.millstream_peak(kind, n, threads), repeats)
            peaks[name] = ops * rounds * threads / seconds
    return Ceilings(threads, read(read_bytes), resident_bytes, read(resident_bytes), peaks)


def _rounds(run: Callable[[int], object]) -> int:
    """As many rounds as take SAMPLE_S."""
    rounds = 16
    while True:
        start = time.perf_counter()
        run(rounds)
        seconds = time.perf_counter() - start
        if seconds > SAMPLE_S / 4:
            return max(1, round(rounds * SAMPLE_S / seconds))
        rounds *= 4


def _best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, the quickest sample: a ceiling is what is possible, not what is usual."""
    run()
    found = []
    for _ in range(repeats):
        calls, seconds, start = 0, 0.0, time.perf_counter()
        while seconds < SAMPLE_S:
            run()
            calls, seconds = calls + 1, time.perf_counter() - start
        found.append(seconds / calls)
    return min(found)
