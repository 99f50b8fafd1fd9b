"""Whole training steps against Hugging Face transformers on PyTorch, step by step in turn.

    python benchmarks/step.py [--case fastmim_vit_base] [--steps 10]

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
CASES = ("fastmim_vit_base",)


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


def compare(case: str, batch: int, steps: int) -> None:
    """Interleave steps of both sides and print what came out."""
    ours = Side(sys.executable, "ours.py", "--case", case, "--batch", str(batch))
    peer = Side(peer_python(), "peer_torch.py", "--case", case, "--batch", str(batch))
    for side in (ours, peer):
        side.step()  # warm-up of the allocator and caches
    pairs = []
    for number in range(steps):
        order = (ours, peer) if number % 2 == 0 else (peer, ours)
        times = {side: side.step() for side in order}
        pairs.append((times[ours], times[peer]))
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    peaks = ours.quit(), peer.quit()
    print(f"{case}, batch {batch}, {steps} pairs of steps")
    print(f"ours: median {mine:.3f} s, {batch / mine:.2f} images/s, first step {ours.first:.1f} s", end="")
    print(f" after start, peak {peaks[0] / 1e9:.2f} GB")
    print(f"peer: median {theirs:.3f} s, {batch / theirs:.2f} images/s, first step {peer.first:.1f} s", end="")
    print(f" after start, peak {peaks[1] / 1e9:.2f} GB")
    print(f"case={case} ratio={ratio:.3f} memory={peaks[0] / peaks[1]:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="step time against transformers on PyTorch")
    parser.add_argument("--case", choices=CASES, help="default: all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="timed pairs of steps")
    args = parser.parse_args()
    for case in [args.case] if args.case else CASES:
        compare(case, args.batch, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
