"""Compiling kernels: cached, shared, and no reason to stop when it cannot be done."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from millstream.ops.cpu import build
from millstream.ops.table import ops

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    try:
        build.find_compiler()
    except build.KernelError:
        pytest.skip("no C++ compiler")
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def other_settings(monkeypatch):
    monkeypatch.setattr(build, "_settings", build.settings())
    monkeypatch.setattr(build, "_warned", False)
    yield
    for op in ops().values():
        op.forget()


def test_a_kernel_is_built_once_and_found_again(source, tmp_path):
    first = build.build(source, tmp_path / "kernels")
    stamp = first.stat().st_mtime_ns
    assert ctypes.CDLL(str(first)).answer() == 42
    assert build.build(source, tmp_path / "kernels") == first
    assert first.stat().st_mtime_ns == stamp
    assert list((tmp_path / "kernels").iterdir()) == [first]


def test_another_source_or_flag_is_another_kernel(source, tmp_path):
    first = build.build(source, tmp_path)
    assert build.build(source, tmp_path, extra=("-DX",)) != first
    source.write_text(SOURCE.replace("42", "43"))
    assert build.build(source, tmp_path) != first


def test_a_kernel_that_this_very_cpu_cannot_have_says_that_it_is_slow(source, tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("not an x86 machine")
    source.write_text(f"#if defined(__SSE4_2__)\n#error not for this one\n#endif\n{SOURCE}")
    with pytest.warns(build.KernelWarning, match="answer.cpp is built for any CPU .* not for this one"):
        built = build.build(source, tmp_path / "kernels")
    assert ctypes.CDLL(str(built)).answer() == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.build(source, tmp_path / "kernels") == built


def test_builders_at_the_same_moment_do_not_disturb_each_other(source, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build.build(source, tmp_path / "kernels"), range(4)))
    assert len(set(built)) == 1
    assert ctypes.CDLL(str(built[0])).answer() == 42
    assert list((tmp_path / "kernels").iterdir()) == [built[0]]


def test_a_source_that_does_not_compile_says_what_the_compiler_said(source, tmp_path):
    source.write_text("int answer( { }")
    with pytest.raises(build.KernelError, match=r"answer\.cpp.*error"):
        build.build(source, tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_kernel_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.KernelError, match="could not be built"):
        build.build(source, tmp_path / "file" / "kernels")


def test_without_a_compiler_everything_falls_to_torch_and_says_so_once(tmp_path, other_settings):
    from millstream.core import registry
    from millstream.core.cache import CacheGroup
    from millstream.formats.kv.plain.device import Plain
    from millstream.ops.attention.protocol import AttentionAsk, choose

    build.configure(tmp_path, "no-such-compiler")
    ask = AttentionAsk("cpu", "float32", "float32", "k-transposed", 9, 3, 64, 64)
    with pytest.warns(build.KernelWarning, match="no-such-compiler"):
        choice = choose(ask)
    assert choice.name == "torch-ref"
    assert dict(choice.refused)["cpu-paged"] == "no C++ compiler: looked for no-such-compiler"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.make("attention", "cpu-paged").accepts(ask) is not None
        pages = Plain().allocate(CacheGroup("full", kv_heads=1, head_dim=8), 2, 32)
        pages.write(0, torch.tensor([3]), torch.ones(1, 1, 8), torch.ones(1, 1, 8))
    assert pages.read(0, torch.tensor([3]))[0].sum() == 8


def test_a_damaged_library_is_removed(source, tmp_path):
    path = build.build(source, tmp_path / "kernels")
    path.write_bytes(b"not a library")
    with pytest.raises(build.KernelError, match="does not load"):
        build._load(path)
    assert not path.exists()
    assert ctypes.CDLL(str(build.build(source, tmp_path / "kernels"))).answer() == 42


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_kernels_run_on_the_openmp_runtime_that_torch_mapped():
    code = """
    import torch
    torch.set_num_threads(2)
    torch.randn(400, 400) @ torch.randn(400, 400)
    from millstream.ops.cpu import build
    def mapped():
        names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        return {n for n in names if any(w in n.rsplit("/", 1)[-1] for w in ("libgomp", "libomp", "libiomp"))}
    before = mapped()
    build.team()
    try:
        build.library("paged_attention")
    except build.KernelError:
        pass
    assert mapped() == before, (before, mapped())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_products_of_bytes_are_right_on_older_machines(machine, tmp_path, monkeypatch):
    from millstream.ops import cases
    from millstream.ops.cpu import blocks, channel, program

    if platform.machine() != "x86_64":
        pytest.skip("not an x86 machine")
    monkeypatch.setattr(build, "MACHINE_FLAGS", ((f"-march={machine}",),))
    library = ctypes.CDLL(str(build.build(build.SOURCES / "program.cpp", tmp_path)))
    monkeypatch.setitem(build._libraries, (build.settings(), "program"), library)
    assert program.refusal() is None
    for product in (blocks.linear_blocks_cpu, channel.linear_channel_cpu):
        found = cases.tables()[product.__name__.removesuffix("_cpu")]
        for case in found.cases:
            got = product(*case.args())
            torch.testing.assert_close(got.double(), found.exact(*case.args())[0], atol=case.atol, rtol=case.rtol)
