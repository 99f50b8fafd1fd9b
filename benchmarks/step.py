"""Compare training steps with Hugging Face transformers on PyTorch (the peer); steps of the two alternate.

    python benchmarks/step.py [--case fastmim_vit_base] [--steps 10]
    python benchmarks/step.py --speedup      # FastMIM Swin-B against SimMIM Swin-B, both of this project

Run it with the Python of this project. The peer has a separate environment (.venv-peer, installed on first use). Both
processes stay loaded and their steps alternate, so both run under the same load. Prints medians, times to the first
step, and `case=<case> ratio=<images/s ours / peer's> memory=<peak ours / peer's>`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-peer"
PEER_PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "numpy<2"]
#: case -> images in a batch (Swin stores many more activations)
CASES = {"fastmim_vit_base": 32, "fastmim_swin_base": 8, "simmim_swin_base": 8}
SPEEDUP = ("fastmim_swin_base", "simmim_swin_base")
#: epochs of the published runs whose results are closest: 84.1 (FastMIM) and 84.0 (SimMIM) top-1
EPOCHS = (400, 800)


class StepProcess:
    """A process that runs a training step for each line `step` and prints its time."""

    def __init__(self, python: Path | str, script: str, *arguments: str):
        command = [str(python), str(ROOT / "benchmarks" / script), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds_to_first_step = self._read("ready")

    def _read(self, word: str) -> float:
        """Return the number in the next line that starts with `word`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return float(line.split()[1])
        raise SystemExit(f"error: {' '.join(map(str, self.process.args))} ended without `{word}`")  # type: ignore

    def send(self, command: str, word: str) -> float:
        """Send a command; returns the number in the reply line that starts with `word`."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read(word)

    def step(self) -> float:
        """Run one step; returns its seconds."""
        return self.send("step", "time")

    def quit(self) -> float:
        """End the process; returns its peak memory in bytes."""
        peak = self.send("quit", "peak")
        self.process.wait()
        return peak


def peer_python() -> Path:
    """Return the Python of the peer's environment, which is installed on first use."""
    python = PEER / "bin" / "python"
    if not (PEER / ".complete").exists():
        print(f"installing the peer into {PEER.name}: {', '.join(PEER_PACKAGES)}", flush=True)
        venv.create(PEER, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        (PEER / ".complete").touch()
    return python


def interleave(processes: tuple[StepProcess, StepProcess], steps: int) -> list[tuple[float, float]]:
    """Run pairs of steps, each process first in every second pair; returns the seconds of each pair."""
    for process in processes:
        process.step()  # warm-up of the allocator and caches
    pairs = []
    for number in range(steps):
        times = {process: process.step() for process in (processes if number % 2 == 0 else processes[::-1])}
        pairs.append((times[processes[0]], times[processes[1]]))
    return pairs


def report(name: str, process: StepProcess, times: tuple[float, ...], batch: int, peak: float) -> None:
    median = statistics.median(times)
    speed = f"median {median:.3f} s, {batch / median:.2f} images/s"
    start = process.seconds_to_first_step
    print(f"{name}: {speed}, first step {start:.1f} s after start, peak {peak / 1e9:.2f} GB")


def our_process(case: str, batch: int) -> StepProcess:
    return StepProcess(sys.executable, "ours.py", "--case", case, "--batch", str(batch))


def compare_with_peer(case: str, batch: int, steps: int) -> None:
    """Print step time and memory of this project and of the peer."""
    ours = our_process(case, batch)
    peer = StepProcess(peer_python(), "peer_torch.py", "--case", case, "--batch", str(batch))
    pairs = interleave((ours, peer), steps)
    ratio = statistics.median(peer_time / our_time for our_time, peer_time in pairs)
    peaks = ours.quit(), peer.quit()
    print(f"{case}, batch {batch}, {steps} pairs of steps")
    for name, process, times, peak in zip(("ours", "peer"), (ours, peer), zip(*pairs, strict=True), peaks, strict=True):
        report(name, process, times, batch, peak)
    print(f"case={case} ratio={ratio:.3f} memory={peaks[0] / peaks[1]:.3f}", flush=True)


def compare_methods(batch: int, steps: int) -> None:
    """Print how much faster FastMIM is than SimMIM, both of this project, because of its lower resolution."""
    processes = our_process(SPEEDUP[0], batch), our_process(SPEEDUP[1], batch)
    pairs = interleave(processes, steps)
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    for name, process, times in zip(SPEEDUP, processes, zip(*pairs, strict=True), strict=True):
        report(name, process, times, batch, process.quit())
    per_recipe = ratio * EPOCHS[1] / EPOCHS[0]
    print(
        f"speedup per_image={ratio:.2f} per_recipe={per_recipe:.2f} (epochs {EPOCHS[0]} against {EPOCHS[1]})",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="compare step times with transformers on PyTorch")
    parser.add_argument("--case", choices=sorted(CASES), help="default: all")
    parser.add_argument("--speedup", action="store_true", help="compare FastMIM with SimMIM instead")
    parser.add_argument("--batch", type=int, help="images per step; default: that of the case")
    parser.add_argument("--steps", type=int, default=10, help="timed pairs of steps")
    args = parser.parse_args()
    if args.speedup:
        compare_methods(args.batch or CASES[SPEEDUP[0]], args.steps)
        return 0
    for case in [args.case] if args.case else CASES:
        compare_with_peer(case, args.batch or CASES[case], args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
