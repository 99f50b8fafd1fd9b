"""C++ files of this project, compiled once for a machine into the user's cache folder and loaded with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
COMPILE_SECONDS = 300  # limit of a compilation; it takes three seconds


class KernelError(Exception):
    """Compiled code cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Source:
    """A C++ file and how it is compiled.

    Attributes:
        path: of the file.
        flags: of the compiler, besides `FLAGS`.
        links: arguments after the file: the libraries it needs.
        version: of these libraries.
    """

    path: Path
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    version: str = ""

    def command(self) -> list[str]:
        """Return the compiler and its flags."""
        return [*find_compiler(), *FLAGS, *self.flags]

    @functools.cached_property
    def target(self) -> Path:
        """The path of the compiled file; its name has a hash of all that it depends on.

        Raises:
            KernelError: there is no compiler or no cache folder.
        """
        version = run_compiler([*find_compiler(), "--version"])[1]
        features = next((line for line in processor().splitlines() if line.startswith(("flags", "Features"))), "")
        parts = [*self.command(), *self.links, version, features, self.version]
        key = hashlib.sha256(b"\0".join([self.path.read_bytes(), *map(str.encode, parts)])).hexdigest()[:16]
        return cache_folder() / f"{self.path.stem}-{key}.so"

    def compiled(self) -> Path:
        """Return the path of the compiled file; compiles it on first use, one process for all.

        Raises:
            KernelError: it cannot be compiled here.
        """
        import fcntl  # not on Windows

        target = self.target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with (target.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a machine wait for the first
                if not is_whole(target):
                    compile_into(target, [*self.command(), str(self.path), *self.links])
        except OSError as error:
            raise KernelError(f"the cache folder {target.parent} cannot be used ({error.strerror or error})") from None
        return target


def find_compiler() -> list[str]:
    """Return the program of the C++ compiler, with its arguments if the variable CXX has some."""
    named = os.environ.get("CXX", "")
    found = named or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise KernelError("there is no C++ compiler (g++ or clang++) on the path")
    try:
        return shlex.split(named) or [found]
    except ValueError as error:
        raise KernelError(f"CXX={named} is not a command ({error})") from None


def cache_folder() -> Path:
    """The user's cache folder for compiled files."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(folder) if Path(folder).is_absolute() else Path.home() / ".cache") / "mim_mindspore"
    except RuntimeError:  # a user without a home folder
        raise KernelError("there is no home folder for the compiled file; set XDG_CACHE_HOME") from None


def processor() -> str:
    """Return Linux's description of the processors."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def compile_into(target: Path, command: list[str]) -> None:
    """Compile into a partial file, append its SHA-256, then rename it; the caller holds the lock."""
    partial = target.with_suffix(".partial")
    try:
        code, output = run_compiler([*command, "-o", str(partial)])
        if code or not partial.is_file():
            lines = output.splitlines()
            errors = [line for line in lines if "error" in line] or lines or [f"exit code {code}"]
            raise KernelError(f"{shlex.join(command[:1])} fails: {errors[0][:200]}")
        content = partial.read_bytes()
        partial.write_bytes(content + hashlib.sha256(content).digest())  # what follows the end of a library is not read
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def is_whole(target: Path) -> bool:
    """Whether a compiled file exists with the bytes that were compiled; loading a damaged one can end the process."""
    content = target.read_bytes() if target.is_file() else b""
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def run_compiler(command: list[str]) -> tuple[int, str]:
    """Run a compiler for at most `COMPILE_SECONDS`; returns exit code and all output.

    Raises:
        KernelError: it does not start, or does not end in time.
    """
    out, merged = subprocess.PIPE, subprocess.STDOUT
    try:
        process = subprocess.Popen(
            command, stdout=out, stderr=merged, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise KernelError(f"{command[0]} does not run ({error.strerror or error})") from None
    try:
        output, _ = process.communicate(timeout=COMPILE_SECONDS)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a compiler starts processes of its own
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise KernelError(f"{command[0]} does not end within {COMPILE_SECONDS} seconds") from None
        raise
    return process.returncode, output


def open_library(path: str, name: str) -> ctypes.CDLL:
    """Load a compiled file into this process.

    Args:
        name: of one of its functions.

    Raises:
        KernelError: the file cannot be loaded, or is not ours.
    """
    try:
        opened = ctypes.CDLL(path)
        getattr(opened, name)
        return opened
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded ({error})") from None


def cores() -> int:
    """Return the CPU cores that this process may use; `taskset` and job schedulers limit them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
