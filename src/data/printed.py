"""Catch what C libraries print."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LIBJPEG = re.compile(
    r"(Corrupt JPEG data: .*|Premature end of JPEG file|Warning: unknown JFIF revision.*|Unknown Adobe .*"
    r"|Inconsistent progression .*|Invalid SOS parameters .*)"
)
LIBTIFF = re.compile(r"[\w.]+: .*\.$")
OPENCV = re.compile(r"\[ *(WARN|ERROR|INFO|DEBUG)")
PRINTING = threading.Lock()


@contextmanager
def printed(*ours: re.Pattern[str]) -> Iterator[list[str]]:
    """Catch what C libraries print to the error output; OpenCV tells libjpeg's warnings in no other way.

    The list has one text after the block if something was printed. Lines that match none of `ours` are passed on.
    """
    texts: list[str] = []
    with PRINTING:
        try:
            keep = os.dup(2)
        except OSError:  # this process has no error output
            yield texts
            return
        catch = os.memfd_create("printed")
        os.dup2(catch, 2)
        try:
            yield texts
        finally:
            os.dup2(keep, 2)
            if os.fstat(catch).st_size:
                texts.append(pass_on(os.pread(catch, 1 << 16, 0), ours))
            os.close(keep)
            os.close(catch)


def pass_on(output: bytes, ours: tuple[re.Pattern[str], ...]) -> str:
    """Print the lines of others, and return all."""
    text = output.decode("utf-8", "replace")
    foreign = [line for line in text.splitlines(True) if not any(pattern.match(line) for pattern in ours)]
    with suppress(OSError):
        os.write(2, "".join(foreign).encode())
    return text
