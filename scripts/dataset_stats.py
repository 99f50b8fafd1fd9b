"""Count images, classes and sizes of a training set, and measure mean and standard deviation for a recipe.

    python scripts/dataset_stats.py RECIPE.yaml [key=value ...]
    python scripts/dataset_stats.py FOLDER|LIST|MINDRECORD [--channels N] [--sample N]

Mean and standard deviation are those of all pixels of the decoded images in the scale 0 to 1. The images of a sample
are spread evenly over the set, so the same command prints the same numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.tasks.command import run_command, whole_number


def main() -> int:
    parser = argparse.ArgumentParser(description="count images, classes and sizes; measure mean and std")
    parser.add_argument("path", metavar="PATH", help="recipe, folder, list file or MindRecord file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--channels", default="", metavar="N", help="bands of the images; as the recipe, or 3")
    parser.add_argument("--sample", default="10000", metavar="N", help="images to decode (default 10000), or all")
    parser.add_argument("--max-pixels", default="", metavar="N", help="larger images are bad, as data.max_pixels")
    parser.add_argument("--workers", default="", metavar="N", help="processes; all cores if left out")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_intermixed_args()

    def measure() -> None:
        sample = 0 if args.sample == "all" else whole_number("--sample", args.sample)
        channels, max_pixels, processes = (
            whole_number(option, text) if text else 0
            for option, text in (
                ("--channels", args.channels),
                ("--max-pixels", args.max_pixels),
                ("--workers", args.workers),
            )
        )
        from src.native import cores
        from src.tasks.dataset import statistics

        statistics(args.path, args.overrides, channels, sample, processes or cores(), max_pixels, args.json)

    return run_command(measure)


if __name__ == "__main__":
    sys.exit(main())
