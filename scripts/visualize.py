"""Draw what training sees: python scripts/visualize.py augment RECIPE.yaml [key=value ...] [--images N] [--out FILE]

Each row of the picture has one image of `data.train`: the whole file, the image as the first epochs of a training see
it, and with each random change of the recipe alone. Masks are in the gallery of a training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.tasks.command import run_command, whole_number


def main() -> int:
    parser = argparse.ArgumentParser(description="draw images as training sees them")
    parser.add_argument("what", choices=["augment"], help="augment: crops, flips and augmentation")
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--images", default="6", metavar="N", help="images, one in each row (default 6)")
    parser.add_argument("--copies", default="4", metavar="N", help="epochs, one in each column (default 4)")
    parser.add_argument("--out", default="", metavar="FILE", help="picture; default: RECIPE_augment.png")
    args = parser.parse_intermixed_args()

    def draw() -> None:
        images, copies = whole_number("--images", args.images), whole_number("--copies", args.copies)
        from src.tasks.augment import draw_augmentation

        draw_augmentation(args.recipe, args.overrides, images, copies, args.out)

    return run_command(draw)


if __name__ == "__main__":
    sys.exit(main())
