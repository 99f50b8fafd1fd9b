"""Whole training steps against Hugging Face transformers on PyTorch, step by step in turn.

    python benchmarks/step.py [--case fastmim_vit_base] [--steps 10]
    python benchmarks/step.py --speedup      # our FastMIM Swin-B against our SimMIM Swin-B

Run it with the Python of this project. The peer gets an environment of its own (.venv-peer, made here once). Both
processes stay loaded; steps alternate, so that both see the same machine. Prints medians, times to the first step,
and `case=<case> ratio=<images/s ours / peer's> memory=<peak ours / peer's>`.
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
#: case -> images in a batch (Swin keeps many more activations)
CASES = {"fastmim_vit_base": 32, "fastmim_swin_base": 8, "simmim_swin_base": 8}
SPEEDUP = ("fastmim_swin_base", "simmim_swin_base")
#: epochs of the published runs whose results are closest: 84.1 (FastMIM) and 84.0 (SimMIM) top-1
EPOCHS = (400, 800)


class Side:
    """One process that answers `step` with its time."""

    def __init__(self, python: Path | str, script: str, *arguments: str):
        command = [str(python), str(ROOT / "benchmarks" / script), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self._answer("ready")

    def _answer(self, word: str) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return float(line.split()[1])
        raise SystemExit(f"error: {' '.join(map(str, self.process.args))} ended without `{word}`")  # type: ignore

    def ask(self, word: str, answer: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer(answer)

    def step(self) -> float:
        return self.ask("step", "time")

    def quit(self) -> float:
        peak = self.ask("quit", "peak")
        self.process.wait()
        return peak


def peer_python() -> Path:
    """The Python of the peer's environment, made on first use."""
    python = PEER / "bin" / "python"
    if not (PEER / ".complete").exists():
        print(f"installing the peer into {PEER.name}: {', '.join(PEER_PACKAGES)}", flush=True)
        venv.create(PEER, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        (PEER / ".complete").touch()
    return python


def interleave(sides: tuple[Side, Side], steps: int) -> list[tuple[float, float]]:
    """Seconds of pairs of steps, first and second in turn."""
    for side in sides:
        side.step()  # warm-up of the allocator and caches
    pairs = []
    for number in range(steps):
        times = {side: side.step() for side in (sides if number % 2 == 0 else sides[::-1])}
        pairs.append((times[sides[0]], times[sides[1]]))
    return pairs


def report(name: str, side: Side, times: tuple[float, ...], batch: int, peak: float) -> None:
    middle = statistics.median(times)
    speed = f"median {middle:.3f} s, {batch / middle:.2f} images/s"
    print(f"{name}: {speed}, first step {side.first:.1f} s after start, peak {peak / 1e9:.2f} GB")


def our_side(case: str, batch: int) -> Side:
    return Side(sys.executable, "ours.py", "--case", case, "--batch", str(batch))


def compare(case: str, batch: int, steps: int) -> None:
    """Ours against the peer."""
    ours, peer = our_side(case, batch), Side(peer_python(), "peer_torch.py", "--case", case, "--batch", str(batch))
    pairs = interleave((ours, peer), steps)
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    peaks = ours.quit(), peer.quit()
    print(f"{case}, batch {batch}, {steps} pairs of steps")
    for name, side, times, peak in zip(("ours", "peer"), (ours, peer), zip(*pairs, strict=True), peaks, strict=True):
        report(name, side, times, batch, peak)
    print(f"case={case} ratio={ratio:.3f} memory={peaks[0] / peaks[1]:.3f}", flush=True)


def compare_methods(batch: int, steps: int) -> None:
    """FastMIM against SimMIM, both ours: what the low resolution saves."""
    sides = our_side(SPEEDUP[0], batch), our_side(SPEEDUP[1], batch)
    pairs = interleave(sides, steps)
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    for name, side, times in zip(SPEEDUP, sides, zip(*pairs, strict=True), strict=True):
        report(name, side, times, batch, side.quit())
    per_recipe = ratio * EPOCHS[1] / EPOCHS[0]
    print(
        f"speedup per_image={ratio:.2f} per_recipe={per_recipe:.2f} (epochs {EPOCHS[0]} against {EPOCHS[1]})",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="step time against transformers on PyTorch")
    parser.add_argument("--case", choices=sorted(CASES), help="default: all")
    parser.add_argument("--speedup", action="store_true", help="FastMIM against SimMIM instead of a peer")
    parser.add_argument("--batch", type=int, help="images in a step; default: of the case")
    parser.add_argument("--steps", type=int, default=10, help="timed pairs of steps")
    args = parser.parse_args()
    if args.speedup:
        compare_methods(args.batch or CASES[SPEEDUP[0]], args.steps)
        return 0
    for case in [args.case] if args.case else CASES:
        compare(case, args.batch or CASES[case], args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
