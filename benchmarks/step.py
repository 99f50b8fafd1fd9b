"""Compare training steps and inference with Hugging Face transformers on PyTorch (the peer), or with an older commit.

    python benchmarks/step.py [--case fastmim_vit_base] [--steps 10] [--threads 1] [--precision bfloat16] [--compile]
    python benchmarks/step.py --case manifold_deit_tiny --against COMMIT
    python benchmarks/step.py --speedup      # FastMIM against SimMIM, both of this project

Run it with the Python of this project. The peer has an environment of its own (.venv-peer), where the newest PyTorch
and transformers are installed on first use. Its matrix library takes a slow path on AMD processors, so there the peer
runs twice: as installed, and with a preloaded function that switches the AVX-512 path on. `--compile` adds
torch.compile.

All processes stay loaded and take steps in turn, so all run under the same load; ratios are of the medians. With one
thread they are of CPU seconds, which other programs hardly change. The last line of a case is

    case=<case> ratio=<> memory=<> ratio_installed=<> limit=<> first=<ours>/<peer> first_again=<ours>

ratio: images/s relative to the fastest peer, compiled or not. memory, first: peak memory relative to the fastest peer
that is not compiled, and the seconds from the start to the end of the first step of both; compilation makes the peer's
larger. ratio_installed: images/s relative to the peer as installed. limit: the share of our step that its matrix
products take in PyTorch; nan if they are on the slow path. first_again: as first, of a run that takes the graph of the
run before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cases import INFERENCE, ROOT, TRAINING, products, recipe_of

PEER = ROOT / ".venv-peer"
PEER_PACKAGES = ["torch", "transformers", "numpy"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch without GPU libraries
CPU_PACKAGES = ("torch", "torchvision")
#: name -> case, images in a batch (Swin stores many more activations)
CASES = {
    "fastmim_vit_base": ("fastmim_vit_base", 32),
    "fastmim_swin_base": ("fastmim_swin_base", 8),
    "fastmim_swin_base_16": ("fastmim_swin_base", 16),
    "simmim_swin_base": ("simmim_swin_base", 8),
    "simmim_vit_base": ("simmim_vit_base", 8),
    "infer_vit_base": ("infer_vit_base", 1),
    "infer_vit_base_32": ("infer_vit_base", 32),
    "infer_swin_base": ("infer_swin_base", 1),
    "infer_swin_base_32": ("infer_swin_base", 32),
}
WITHOUT_PEER = {"manifold_deit_tiny": ("manifold_deit_tiny", 64)}
#: encoder -> FastMIM, SimMIM, epochs of the published runs whose results are closest, and overrides of FastMIM.
#: Top-1: Swin-B 84.1 and 84.0, ViT-B 83.8 and 83.8; the released pre-training of ViT-B has 6 heads
SPEEDUP = {
    "swin_base": ("fastmim_swin_base", "simmim_swin_base", (400, 800), [], 22),
    "vit_base": ("fastmim_vit_base", "simmim_vit_base", (800, 800), ["encoder.num_heads=6"], 10),
}
FAST, COMPILED = "PyTorch with AVX-512 products", "PyTorch compiled"
AMD = "AuthenticAMD"
AVX512 = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"  # MKL asks it whether the processor is from Intel


class EndedError(Exception):
    """A process ended before it answered."""


class StepProcess:
    """A process that runs a step for each line `step` and prints its times (benchmarks/serve.py).

    Args:
        command: a Python and its arguments.
        threads: number of cores that it may use.
        preload: a library that is loaded before all others.
        variables: of its environment.
    """

    def __init__(self, command: Sequence[str | Path], threads: int, preload: Path | None = None, **variables: str):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self.command = list(map(str, command))
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        # MindSpore's thread pools have one thread per core that the process may use, whatever its settings
        os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[:threads])
        self.times: list[list[float]] = []
        self.ready = self._read("ready")

    def _read(self, word: str) -> list[float]:
        """Return the numbers in the next line that starts with `word`; older commits print the first only."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return [*map(float, line.split()[1:]), *[float("nan")] * 3][:4]
        raise EndedError(f"{' '.join(self.command)} ended without `{word}`")

    def send(self, command: str, word: str) -> list[float]:
        """Send a command; returns the numbers in the reply line that starts with `word`."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read(word)

    def step(self) -> list[float]:
        """Run one step; returns its wall and CPU seconds."""
        return self.send("step", "time")

    def median(self, clock: int = 0) -> float:
        """Return the median seconds of the timed steps: clock 0 wall, 1 CPU."""
        return statistics.median(times[clock] for times in self.times)

    def quit(self) -> float:
        """End the process; returns its peak memory in bytes."""
        peak = self.send("quit", "peak")[0]
        self.process.wait()
        return peak


def interleave(processes: Sequence[StepProcess], steps: int) -> None:
    """Run rounds of one step of each process, in turn from another one on; the processes keep the times."""
    for process in processes:
        process.step()  # warm-up of the allocator and caches
    for number in range(steps):
        first = number % len(processes)
        for process in [*processes[first:], *processes[:first]]:
            process.times.append(process.step())


def report(name: str, process: StepProcess, batch: int) -> float:
    """Print the figures of a process and end it; returns its peak memory in bytes."""
    peak, wall = process.quit(), process.median()
    first, first_cpu, _, imported = process.ready
    print(f"{name}: {wall:.3f} s (CPU {process.median(1):.3f}), {batch / wall:.2f} images/s, peak {peak / 1e9:.2f} GB")
    print(f"  first step after {first:.1f} s (CPU {first_cpu:.1f}), {imported / 1e9:.2f} GB after the imports")
    return peak


# --- the peer -------------------------------------------------------------------------------------------------------


def peer_python(folder: Path = PEER, packages: Sequence[str] = PEER_PACKAGES) -> Path:
    """Return the Python of a peer's environment, which is installed on first use."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        print(f"installing the peer into {folder.name}: {', '.join(packages)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        if reachable(CPU_INDEX):
            on_cpu = [name for name in packages if name in CPU_PACKAGES]
            subprocess.run([*install, "--index-url", CPU_INDEX, *on_cpu], check=False)
        if subprocess.run([*install, *packages], check=False).returncode:
            raise SystemExit(f"error: cannot install {', '.join(packages)} into {folder}")
        (folder / ".complete").touch()
    return python


def reachable(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def peer_versions(python: Path, *names: str) -> str:
    code = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def processor() -> tuple[str, str]:
    """Return name and maker of the processor."""
    text = Path("/proc/cpuinfo").read_text()
    found = [re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "vendor_id")]
    return found[0][1] if found[0] else "unknown processor", found[1][1] if found[1] else ""


def avx512_library() -> Path | None:
    """Return the library that makes MKL use AVX-512 on a processor from AMD; None where it is not needed or built."""
    if processor()[1] != AMD:
        return None
    library, source = PEER / "mkl_avx512.so", PEER / "mkl_avx512.c"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not library.exists():
        if compiler is None:
            print("no compiler: PyTorch as installed only")
            return None
        source.write_text(AVX512)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


# --- comparisons ----------------------------------------------------------------------------------------------------


def our_process(
    case: str, batch: int, threads: int, *overrides: str, root: Path = ROOT, stored_graph: bool = False
) -> StepProcess:
    command = [sys.executable, root / "benchmarks/ours.py", "--case", case, "--batch", str(batch), *overrides]
    variables = {} if stored_graph else {"MS_COMPILER_CACHE_ENABLE": "0"}
    return StepProcess(command, threads, **variables)


def first_step_with_stored_graph(case: str, batch: int, threads: int, *overrides: str) -> list[float]:
    """Return wall and CPU seconds to the end of the first step of a run that takes the graph of the run before."""
    for _ in range(2):
        process = our_process(case, batch, threads, *overrides, stored_graph=True)
        process.quit()
    return process.ready


def peer_processes(case: str, batch: int, args: argparse.Namespace) -> tuple[dict[str, StepProcess], StepProcess]:
    """Return the variants of the peer, as installed first, and the process that computes the products alone."""
    library = avx512_library()
    command = [peer_python(), ROOT / "benchmarks/peer_torch.py", "--batch", str(batch), "--precision", args.precision]
    peers = {"PyTorch as installed": StepProcess([*command, "--case", case], args.threads)}
    if library is not None:
        peers[FAST] = StepProcess([*command, "--case", case], args.threads, library)
    if args.compile:
        try:
            compiled = StepProcess([*command, "--case", case, "--compile"], args.threads, library)
            peers[COMPILED] = compiled
        except EndedError:
            print("torch.compile fails")
    entries = json.dumps(products(recipe_of(case), batch))
    return peers, StepProcess([*command, "--products", entries], args.threads, library)


def compare_with_peer(name: str, args: argparse.Namespace) -> None:
    """Print times and memory of this project and of the peer."""
    case, batch = CASES[name][0], args.batch or CASES[name][1]
    overrides = [] if args.precision == "float32" else [f"train.precision={args.precision}"]
    ours = our_process(case, batch, args.threads, *overrides)
    peers, alone = peer_processes(case, batch, args)
    installed = next(iter(peers.values()))
    if ours.ready[2] != installed.ready[2]:
        raise SystemExit(f"error: {case}: {ours.ready[2]:.0f} parameters here, {installed.ready[2]:.0f} in the peer")
    interleave([ours, *peers.values(), alone], args.steps)
    clock = args.threads == 1
    eager = min((peer for title, peer in peers.items() if title != COMPILED), key=lambda peer: peer.median(clock))
    best = min(peers.values(), key=lambda peer: peer.median(clock))
    title = f"{case}, batch {batch}, {args.precision}, {ours.ready[2]:,.0f} parameters on both sides"
    print(f"{title}, threads: {args.threads}, rounds: {args.steps}, {processor()[0]}")
    our_peak = report("ours", ours, batch)
    peaks = {id(peer): report(title, peer, batch) for title, peer in peers.items()}
    print(f"the matrix products alone: {alone.median():.3f} s (CPU {alone.median(1):.3f})")
    alone.quit()
    warm = [float("nan")] * 2
    if case in TRAINING:
        warm = first_step_with_stored_graph(case, batch, args.threads, *overrides)
        print(f"ours with the graph of an earlier run: first step after {warm[0]:.1f} s (CPU {warm[1]:.1f})")
    if COMPILED in peers and best is eager:
        print("torch.compile is slower")
    at_best = FAST in peers or processor()[1] != AMD
    limit = alone.median(clock) / ours.median(clock) if at_best else float("nan")
    ratio, ratio_installed = (peer.median(clock) / ours.median(clock) for peer in (best, installed))
    print(
        f"case={name} ratio={ratio:.3f} memory={our_peak / peaks[id(eager)]:.3f} ratio_installed={ratio_installed:.3f} "
        f"limit={limit:.3f} first={ours.ready[0]:.1f}/{eager.ready[0]:.1f} first_again={warm[0]:.1f}",
        flush=True,
    )


def compare_with_commit(name: str, args: argparse.Namespace) -> None:
    """Print seconds and memory relative to an older commit of this project."""
    case, batch = {**CASES, **WITHOUT_PEER}[name]
    batch = args.batch or batch
    with checkout(args.against) as root:
        processes = [our_process(case, batch, args.threads, root=root) for root in (ROOT, root)]
        interleave(processes, args.steps)
        print(f"{case}, batch {batch}, threads: {args.threads}, rounds: {args.steps}, {processor()[0]}")
        titles = "ours", f"commit {args.against}"
        peaks = [report(title, process, batch) for title, process in zip(titles, processes, strict=True)]
    # older commits print no CPU seconds
    clock = args.threads == 1 and all(process.median(1) > 0 for process in processes)
    ours, theirs = (process.median(clock) for process in processes)
    print(f"case={name} against={args.against} ratio={ours / theirs:.3f} memory={peaks[0] / peaks[1]:.3f}", flush=True)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A temporary folder with the files of a commit."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        done = subprocess.run(
            [*git, "worktree", "add", "--quiet", "--detach", root, commit], check=False, stderr=subprocess.DEVNULL
        )
        if done.returncode:
            raise SystemExit(f"error: --against {commit}: git cannot check it out; write a commit of this project")
        try:
            yield root
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", root], check=True)


def compare_methods(encoder: str, args: argparse.Namespace) -> None:
    """Print how much faster FastMIM is than SimMIM, both of this project, because of its lower resolution."""
    fast, slow, epochs, overrides, blocks = SPEEDUP[encoder]
    batch = args.batch or 8
    processes = {
        "FastMIM": our_process(fast, batch, args.threads, *overrides),
        f"FastMIM, first {blocks} blocks": our_process(
            fast, batch, args.threads, *overrides, f"method.encoder_blocks={blocks}"
        ),
        "SimMIM": our_process(slow, batch, args.threads),
    }
    interleave(list(processes.values()), args.steps)
    print(f"{encoder}, batch {batch}, threads: {args.threads}, rounds: {args.steps}, {processor()[0]}")
    for title, process in processes.items():
        report(title, process, batch)
    whole, cut, peer = (process.median(args.threads == 1) for process in processes.values())
    per_epoch = epochs[1] / epochs[0]
    print(
        f"speedup={encoder} per_image={peer / whole:.2f} per_recipe={peer / whole * per_epoch:.2f} "
        f"per_recipe_first_{blocks}_blocks={peer / cut * per_epoch:.2f} (epochs {epochs[0]} against {epochs[1]})",
        flush=True,
    )


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="compare step times with transformers on PyTorch")
    parser.add_argument("--case", choices=sorted([*CASES, *WITHOUT_PEER]), help="default: all with a peer")
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit instead of the peer")
    parser.add_argument("--speedup", action="store_true", help="compare FastMIM with SimMIM instead")
    parser.add_argument("--batch", type=int, help="images per step; default: that of the case")
    parser.add_argument("--steps", type=int, default=10, help="timed rounds of steps")
    parser.add_argument("--threads", type=int, default=cores, help="cores for each side (%(default)s)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of training")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    args = parser.parse_args()
    if not 1 <= args.threads <= cores:
        parser.error(f"--threads: {args.threads}; write 1 to {cores}, the cores of this machine")
    if args.case in WITHOUT_PEER and not args.against:
        parser.error(f"--case {args.case}: it has no peer; write --against COMMIT")
    if args.precision != "float32" and args.case and CASES.get(args.case, ("",))[0] in INFERENCE:
        parser.error("--precision: inference is float32; choose a training case")
    if (args.against or args.speedup) and (args.compile or args.precision != "float32"):
        parser.error("--compile and --precision need the peer; leave --against and --speedup out")
    return args


def main() -> int:
    args = parse()
    if args.speedup:
        for encoder in SPEEDUP:
            compare_methods(encoder, args)
        return 0
    if args.against:
        compare_with_commit(args.case or "manifold_deit_tiny", args)
        return 0
    print(f"peer: {peer_versions(peer_python(), *PEER_PACKAGES[:2])}")
    for name in [args.case] if args.case else CASES:
        if args.precision == "float32" or CASES[name][0] not in INFERENCE:
            compare_with_peer(name, args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EndedError as error:
        sys.exit(f"error: {error}")
