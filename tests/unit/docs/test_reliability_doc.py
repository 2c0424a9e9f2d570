"""docs/reliability.md names tests that exist, and leaves no row out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
SHORT = {
    "BR": "e2e/test_bad_requests.py",
    "SF": "e2e/test_server_faults.py",
    "SO": "e2e/test_server_outages.py",
    "SV": "e2e/test_supervisor.py",
    "EP": "unit/engine/test_engine_process.py",
}
VERDICTS = ("holds", "part", "not offered", "not covered")


def rows() -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if re.match(r"\| [BF]\d", line)
    ]


def test_every_row_is_there_once():
    found = []
    for first, *_ in rows():
        for one in first.split(", "):
            letter = one[0]
            ends = [int(part.strip("BF")) for part in one.split("-")]
            found += [f"{letter}{number}" for number in range(ends[0], ends[-1] + 1)]
    assert sorted(found) == sorted([*(f"B{i}" for i in range(1, 61)), *(f"F{i}" for i in range(1, 28))])


def test_what_is_named_exists_and_verdicts_are_of_the_known_ones():
    for name, _, test, verdict in rows():
        assert verdict.startswith(VERDICTS), name
        if verdict.startswith("holds"):
            assert "`" in test or any(short in test for short in SHORT), name
        for path in re.findall(r"`((?:unit|e2e|laws|invariance|benchmarks)/[^`\s]*)", test):
            root = ROOT if path.startswith("benchmarks/") else ROOT / "tests"
            assert (root / path).exists(), f"{name}: {path}"
        sources = [ROOT / "tests" / SHORT[short] for short in SHORT if re.search(rf"\b{short}\b", test)]
        text = "".join(source.read_text() for source in sources)
        for prefix in re.findall(r"`(test_[a-z0-9_]+)…?`", test):
            known = f"def {prefix}" in text or any(
                (path.name == f"{prefix}.py") for path in ROOT.rglob(f"tests/**/{prefix}.py")
            )
            assert known, f"{name}: {prefix}"
