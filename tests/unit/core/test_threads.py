"""Importing the package keeps OpenMP's threads from spinning, unless somebody decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "import millstream, os; print(os.environ.get('GOMP_SPINCOUNT'))"


def spin_count(**given: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_threads_spin_briefly_by_default() -> None:
    assert spin_count() == "2000"


@pytest.mark.parametrize(("given", "left"), [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_what_the_user_decided_stays(given: dict[str, str], left: str) -> None:
    assert spin_count(**given) == left
