"""What all commands share: exit codes, and what a terminal gets to see of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from src.data.sources import DataError
from src.tasks.command import one_line, run_command
from tests.helpers import ROOT


def failing(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("a.jpg: no image"), 2, "error: a.jpg: no image\n"),
        (DataError("a\n\x1b[31mb.jpg: no image"), 2, "error: a\\n\\x1b[31mb.jpg: no image\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["an error that the user can fix", "a name with control characters", "interrupted"],
)
def test_how_a_command_ends(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: failing(error)) == code
    assert capsys.readouterr().err == text


def test_other_errors_are_ours_and_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: failing(ZeroDivisionError()))


def test_printable_text_stays() -> None:
    assert one_line("Größe 3 × 4: 图片") == "Größe 3 × 4: 图片"


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As in `python scripts/predict.py ... | head -1`."""
    program = (
        "from src.tasks.command import run_command; import sys; sys.exit(run_command(lambda: print('line\\n' * 10**6)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 141
