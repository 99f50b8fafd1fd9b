"""Classify images: python scripts/predict.py --ckpt FILE IMAGE_OR_FOLDER ... [--top K] [--json] [key=value ...]

Prints the most probable classes of each image with their probabilities, or with --json one JSON line per image. Images
go through the evaluation transform. An error at the end names the files that cannot be used; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.config import plural
from src.config.paths import existing_file, expanded
from src.errors import UserError
from src.tasks.command import check_overrides, line, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="print classes and probabilities of images")
    parser.add_argument("--ckpt", required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image")
    parser.add_argument("--json", action="store_true", help="print one JSON line per image")
    parser.add_argument("--exif", choices=["ignore", "apply"], help="turn images as EXIF says; default: as in training")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="files, folders, or key=value changes")
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.images if "=" in word and not os.path.exists(word)]  # noqa: PTH110 # never raises
    images = [word for word in args.images if word not in overrides]
    if not images:
        parser.error("the following arguments are required: IMAGE_OR_FOLDER")

    def command() -> None:
        path = str(existing_file(args.ckpt, "--ckpt"))
        changes = [*overrides, *([f"data.exif={args.exif}"] if args.exif else [])]
        check_overrides(changes)
        if args.top < 1:
            raise UserError(f"--top: {args.top} is not above 0; write 1 or more")
        paths = [expanded(image, "command line") for image in images]
        for name in paths:
            if not os.path.exists(name):  # noqa: PTH110
                raise UserError(f"{name}: no such file or folder")

        from src.data.sources import DataError
        from src.tasks.predict import predict

        unreadable, count = [], 0
        for prediction in predict(path, paths, args.top, changes):
            count += 1
            if not prediction.classes:
                unreadable.append(f"{prediction.path} ({prediction.reason})")
            elif args.json:
                classes = [{"class": name, "probability": round(share, 6)} for name, share in prediction.classes]
                print(json.dumps({"image": str(prediction.path), "classes": classes}), flush=True)
            else:
                row = "  ".join(f"{name} {100 * share:5.2f} %" for name, share in prediction.classes)
                line(f"{prediction.path}  {row}")
        if unreadable:
            raise DataError(f"{len(unreadable)} of {plural(count, 'image')} cannot be used: {', '.join(unreadable)}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
