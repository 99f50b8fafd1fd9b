"""Runs compile_cache_cases.py in a process of its own: MindSpore's cache depends on all graphs of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.compiles)])
def test_in_a_process_of_its_own(compiles: bool) -> None:
    selected = "compiles" if compiles else "not compiles"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selected]
    done = subprocess.run(
        [*command, "tests/compile_cache_cases.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
