from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from synthetic_experiment import COPIES, TIME, Synthetic

from millstream.core.errors import ConfigError
from millstream.reproduce import harness
from millstream.reproduce.plot import plot
from millstream.reproduce.protocol import CheckResult, CheckRow


def times(arm: str, repeat: int) -> float:
    return {"slow": 3.1, "fast": 1.2, "odd": 2.2}[arm] * (1 + 0.03 * (repeat * 7 % 5 - 2))


class Drawn(Synthetic):
    required = (TIME, COPIES)


def test_a_record_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    record = harness.run(Drawn(tmp_path, times=times), root=tmp_path)
    png, svg = plot(record, tmp_path / "plots" / "drawn")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    for part in ("slow", "fast", "odd", "time_s", "required", "lower is better"):
        assert part in text
    # A mark and its arrow for each bound: the words of the title alone would not show that there is one.
    assert text.count("#dc2626") >= 4
    # No ground of its own: the page behind shows through, light or dark.
    assert "#ffffff" not in text
    assert str(tmp_path) not in text


def test_the_same_record_draws_the_same_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    record = harness.run(Drawn(tmp_path, times=times), root=tmp_path)
    assert plot(record, tmp_path / "a")[1].read_bytes() == plot(record, tmp_path / "b")[1].read_bytes()


def test_a_void_record_has_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    wrong = CheckResult((CheckRow("same tokens", False),))
    record = harness.run(Drawn(tmp_path, check=lambda ctx: wrong), root=tmp_path)
    with pytest.raises(ConfigError, match="holds no measurement"):
        plot(record, tmp_path / "void")


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = dataclasses.replace(harness.run(Drawn(tmp_path), root=tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"millstream\[bench\]"):
        plot(record, tmp_path / "none")
