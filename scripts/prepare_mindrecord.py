"""Write the images of a folder or list into MindRecord files, which large clusters read faster than many small files.

    python scripts/prepare_mindrecord.py SOURCE OUT [--shards N] [--shorter-side S]
    python scripts/prepare_mindrecord.py --check OUT

OUT is NAME.mindrecord, or a folder for SOURCE's name. Images are copied byte for byte; with --shorter-side those with a
larger shorter side are resized and written as JPEG. Images that cannot be used are left out and listed. The command
can be stopped at any time; repeated, it goes on. OUT.json has a checksum of each file, which --check compares; a
finished set is checked and stays unchanged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.config import DataConfig
from src.errors import UserError
from src.native import cores
from src.tasks.command import run_command, whole_number

LARGEST_PAGE = 256  # MiB


def main() -> int:
    parser = argparse.ArgumentParser(description="write images into MindRecord files, or check them")
    parser.add_argument("source", metavar="SOURCE", help="folder, list file or MindRecord file")
    parser.add_argument("out", nargs="?", default="", metavar="OUT", help="NAME.mindrecord, or a folder")
    parser.add_argument("--check", action="store_true", help="compare the files of OUT with their checksums")
    parser.add_argument("--shards", default="", metavar="N", help="number of files; one for 10000 images if left out")
    parser.add_argument("--shorter-side", default="", metavar="PIXELS", help="resize larger images to it")
    parser.add_argument("--quality", default="95", metavar="Q", help="of resized JPEG images, 1 to 100 (default 95)")
    parser.add_argument("--channels", default="3", metavar="N", help="bands of the images, as encoder.in_chans")
    parser.add_argument(
        "--max-pixels", default=str(DataConfig.max_pixels), metavar="N", help="larger images are left out"
    )
    parser.add_argument("--page-size", default="32", metavar="MIB", help="largest image, 1 to 256 MiB (default 32)")
    parser.add_argument("--workers", default="", metavar="N", help="processes; all cores if left out")
    args = parser.parse_args()
    complete = True

    def command() -> None:
        nonlocal complete
        if args.check:
            if args.out:
                raise UserError("command line: --check takes OUT alone; leave SOURCE out")
            from src.tasks.records import check

            complete = check(args.source)
        else:
            write(args)

    return run_command(command) or int(not complete)


def write(args: argparse.Namespace) -> None:
    """Check the options, which needs no slow imports, and write the set."""
    if not args.out:
        raise UserError("command line: OUT is missing; write NAME.mindrecord or a folder after SOURCE")
    quality, page = whole_number("--quality", args.quality), whole_number("--page-size", args.page_size)
    if quality > 100:
        raise UserError(f"command line: --quality: {quality} is above 100; write for example 95")
    if page > LARGEST_PAGE:
        raise UserError(f"command line: --page-size: {page} is above {LARGEST_PAGE} MiB; write {LARGEST_PAGE} or less")
    shards = whole_number("--shards", args.shards) if args.shards else 0
    side = whole_number("--shorter-side", args.shorter_side) if args.shorter_side else 0
    channels, max_pixels = whole_number("--channels", args.channels), whole_number("--max-pixels", args.max_pixels)
    processes = whole_number("--workers", args.workers) if args.workers else cores()
    from src.tasks.records import Options, prepare

    options = Options(shards, side, quality, channels, max_pixels, page << 20)
    prepare(args.source, args.out, options, processes)


if __name__ == "__main__":
    sys.exit(main())
