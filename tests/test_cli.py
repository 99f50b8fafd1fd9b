"""What all commands share: exit codes, and what a terminal gets to see of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.data.sources import DataError
from src.errors import one_line
from src.tasks.command import run_command
from tests.helpers import ROOT, Run, assert_one_line_error, take_interrupts


def failing(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("a.jpg: no image"), 2, "error: a.jpg: no image\n"),
        (DataError("a\n\x1b[31mb.jpg: no image"), 2, "error: a\\n\\x1b[31mb.jpg: no image\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            MemoryError("117 GiB"),
            2,
            "error: more memory is needed than there is (117 GiB); write a smaller network or batch\n",
        ),
    ],
    ids=["an error that the user can fix", "a name with control characters", "interrupted", "too large"],
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


#: opens a file, prints, and says on stderr how many bytes the file has
PRINTING = """
import os, sys, tempfile
from src.tasks.command import line, run_command
def command():
    with tempfile.TemporaryFile() as file:
        os.write(1, b"a library prints")
        line({text!r})
        sys.stderr.write(str(os.fstat(file.fileno()).st_size))
sys.exit(run_command(command))
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command(closed: str) -> None:
    """As a service may start it; what is printed must not land in a file that got the number of a stream."""
    command = [sys.executable, "-c", PRINTING.format(text="x")]
    shell = ["sh", "-c", f'"$@" {closed}', "sh", *command]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ("" if "2>" in closed else "0")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_any_name_is_printed_on_one_line(encoding: str) -> None:
    command = [sys.executable, "-c", PRINTING.format(text="ü\udcff\n\x1b[31m.jpg")]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)
    name = b"\\xfc" if encoding.startswith("ascii") else "ü".encode()
    assert done.returncode == 0 and done.stdout.endswith(name + b"\\udcff\\n\\x1b[31m.jpg\n")


def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-c", PRINTING.format(text="x").replace('os.write(1, b"a library prints")', "")]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: stdout: the disk is full; print to another one\n"


def test_a_removed_working_folder_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = ["sh", "-c", 'cd "$1" && rmdir "$1" && "$2" "$3"/eval.py --ckpt a.ckpt', "sh", gone, sys.executable, ROOT]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: the working folder has been removed; change to another one\n"


def test_an_interrupt_while_mindspore_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mindspore.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    while True:\n        pass\n"
        "except KeyboardInterrupt:\n    raise ImportError('initialization failed')\n"
    )
    program = (
        "import sys; from src.tasks.command import run_command; sys.path.insert(0, sys.argv[1]);"
        "sys.exit(run_command(lambda: __import__('mindspore')))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=take_interrupts)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


@pytest.mark.parametrize(
    "command",
    ["verify_dataset.py", "dataset_stats.py", "split_dataset.py", "prepare_mindrecord.py", "predict.py --ckpt"],
)
def test_an_empty_path_is_not_the_working_folder(command: str, tmp_path: Path, run_entry: Run) -> None:
    """As of a shell variable that is not set."""
    script, *words = command.split()
    done = run_entry(f"scripts/{script}", *words, "", str(tmp_path / "a.mindrecord"))
    if script in ("dataset_stats.py", "split_dataset.py"):
        done = run_entry(f"scripts/{script}", "")
    assert_one_line_error(done, "the path is empty")
