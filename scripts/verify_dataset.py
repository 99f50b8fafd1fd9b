"""Decode every image of folders, lists and MindRecord files, and report those that cannot be used.

    python scripts/verify_dataset.py PATH [PATH ...] [--json] [--out bad_images.jsonl]

Prints each bad image with its reason, and how many there are for each reason. Exit code 0 if all images are good, 1 if
some are bad, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.config import DataConfig
from src.native import cores
from src.tasks.command import run_command, whole_number


def main() -> int:
    parser = argparse.ArgumentParser(description="decode every image, report those that cannot be used")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder, list file, MindRecord file or image")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--out", default="", metavar="FILE", help="write the bad images as a training does")
    parser.add_argument("--channels", default="3", metavar="N", help="bands of the images, as encoder.in_chans")
    parser.add_argument("--max-pixels", default=str(DataConfig.max_pixels), metavar="N", help="larger images are bad")
    parser.add_argument("--workers", default="", metavar="N", help="processes; all cores if left out")
    args = parser.parse_args()
    good = True

    def verify_all() -> None:
        nonlocal good
        channels = whole_number("--channels", args.channels)
        pixels = whole_number("--max-pixels", args.max_pixels)
        processes = whole_number("--workers", args.workers) if args.workers else cores()
        from src.data.decode import Decoder
        from src.tasks.dataset import verify

        good = verify(args.paths, Decoder(channels, max_pixels=pixels), processes, args.out, args.json)

    return run_command(verify_all) or int(not good)


if __name__ == "__main__":
    sys.exit(main())
