"""Opens files in little memory, as a process of its own; prints for each what it says.

python -m tests.limited MEBIBYTES module:function FILE ...
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from src.errors import UserError
from tests.helpers import ROOT


def answers(function: str, files: Iterable[Path], mebibytes: int = 300) -> dict[str, str]:
    """What a function says about each file, by the file's name, with `mebibytes` of memory more than it starts with.

    A file that takes more than a minute, or ends the process, has no answer, nor have those after it.
    """
    command = [sys.executable, "-m", "tests.limited", str(mebibytes), function, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return dict(json.loads(line) for line in done.stdout.splitlines())


def main(mebibytes: str, function: str, *files: str) -> None:
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(mebibytes) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for file in files:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 60, resource.RLIM_INFINITY))
        try:
            call(Path(file))
            text = "read"
        except UserError as error:
            text = str(error)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        print(json.dumps([Path(file).name, text]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
