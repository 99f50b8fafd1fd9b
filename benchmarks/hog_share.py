"""Time of the HOG target as a share of the FastMIM training step: python benchmarks/hog_share.py [--steps 7]

Times the HOG target of a batch and the whole step of the same recipe alternately.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from cases import recipe_of
from mindspore import Tensor
from ours import Stepper


def main() -> int:
    parser = argparse.ArgumentParser(description="measure the share of the HOG target in a FastMIM step")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    stepper = Stepper(recipe_of("fastmim_vit_base"), args.batch)
    target = stepper.step.method.target
    image = Tensor(stepper.rng.standard_normal(stepper.shape).astype("float32"))
    target(image).asnumpy()
    stepper.run()
    shares, times = [], []
    for _ in range(args.steps):
        step = stepper.run()[0]
        start = time.perf_counter()
        target(image).asnumpy()
        times.append(time.perf_counter() - start)
        shares.append(times[-1] / step)
    print(f"HOG {1000 * statistics.median(times):.1f} ms, {100 * statistics.median(shares):.2f} % of the step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
