"""The C++ kernels under AddressSanitizer, over the case tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from millstream.ops.cpu import build

CODE = """
import ctypes, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/../models", {tests!r} + "/.."]
import torch
import attention_steps
from millstream.core import registry
from millstream.formats.kv import _coded
from millstream.formats.kv.plain import device
from millstream.ops.cpu import blocks, channel, elementwise, fpx, kv_write, kv_write_codes, linear
from millstream.ops import cases
from millstream.ops.cases.attention import CASES
from millstream.ops.cpu import build

# With everything checked the compiler takes minutes.
build.COMPILE_LIMIT_S = 900
flags = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1")
for source in build.SOURCES.glob("*.cpp"):
    path = build.build(source, Path({directory!r}), extra=flags)
    build._libraries[(build.settings(), source.stem)] = ctypes.CDLL(str(path))
# From the checked allocator, so that reading beyond the pages is seen.
device._zeros = _coded.zeros = lambda shape, dtype, where: torch.zeros(shape, dtype=dtype)
backend = registry.make("attention", "cpu-paged")
for case in CASES:
    attention_steps.lay_out(case).whole(backend)
    for kv in ("int8", "int4") if case.page_dtype == "float32" else ():
        attention_steps.lay_out(case, kv).whole(registry.make("attention", "cpu-" + kv))
import test_shared_prefix as shared
for kind in shared.PAGES:
    for options in ({{}}, {{"block_size": 48, "window": 600}}):
        step = shared.grow(shared.FEW_SHOT, kind, **options)
        shared.agree(step, kind)
import paged, support
from millstream.models.decoder import build as build_decoder
from millstream.models.quantize.recipe import Recipe
from millstream.models.quantize.run import quantize
for name, form, head in (
    ("tiny-llama", "block4", "block8"), ("tiny-gemma", "block4", "block8"), ("tiny-gemma", "w4a8", "w8a8")
):
    decoder = build_decoder(*quantize(*support.tiny_tensors(name), Recipe.plain(form, head=head)))
    tokens = [(7 * i) % 190 + 3 for i in range(70)]
    for kv, attention in (("plain", "cpu-paged"), ("int8", "cpu-int8"), ("int4", "cpu-int4")):
        row = paged.Row(decoder, 70, attention, kv)
        for start, stop in ((0, 1), (1, 40), (40, 41), (41, 70)):
            row.run(tokens, start, stop)
    decoder.best(torch.randn(3, decoder.spec.width), [2, 0])
for table in cases.tables().values():
    native = table.op.implementations.get("cpu")
    for case in table.cases:
        if native and native.accepts(table.op.ask(*case.args())) is None:
            table.outcome(native.function, case.args())
print("clean")
"""


@pytest.mark.long
def test_no_kernel_touches_memory_that_is_not_its_own(tmp_path):
    try:
        compiler = build.find_compiler()
    except build.KernelError as error:
        pytest.skip(str(error))
    asked = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    runtime = asked.stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("the compiler has no AddressSanitizer runtime to preload")
    code = CODE.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stdout + done.stderr[-4000:]
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
