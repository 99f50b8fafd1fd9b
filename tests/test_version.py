"""Another MindSpore than the tested one runs, with one line of warning."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from src.tasks import command
from src.tasks.command import TESTED_MINDSPORE, run_command, version_warning
from tests.helpers import ROOT


def installed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake the version of the installed MindSpore."""
    monkeypatch.setattr(metadata, "version", lambda name: {"mindspore": version}[name])


@pytest.mark.parametrize(("version", "age"), [("2.11.0", "newer"), ("2.10.1", "newer"), ("2.9.1", "older")])
def test_another_version_runs_with_one_line(
    version: str, age: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(version, monkeypatch)
    done = []
    assert run_command(lambda: done.append("command")) == 0
    printed = capsys.readouterr()
    assert done == ["command"] and printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"mindspore {version} is {age} than the tested {TESTED_MINDSPORE}; ")


@pytest.mark.parametrize("version", ["2.10.0", "2.10", "2.10.0rc1", "2.10.0.post1", "", "unknown"])
def test_the_tested_version_runs_without_a_line(version: str) -> None:
    assert version_warning(version) == ""


def test_no_mindspore_is_not_an_old_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The import explains what is missing."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({}, 1),
        ({"MS_ROLE": "MS_WORKER", "RANK_ID": "0"}, 1),
        ({"MS_ROLE": "MS_WORKER", "RANK_ID": "1"}, 0),
        ({"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}, 0),
    ],
    ids=["one process", "rank 0", "rank 1", "scheduler"],
)
def test_only_rank_0_prints(
    environment: dict[str, str], lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("2.11.0", monkeypatch)
    for name in ("MS_ROLE", "RANK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run_command(lambda: None)
    assert capsys.readouterr().err.count("\n") == lines


def test_the_tested_version_is_the_pinned_one() -> None:
    pinned = re.search(r"^mindspore==(\S+)$", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    assert pinned is not None and pinned[1] == TESTED_MINDSPORE == command.mindspore_version()
