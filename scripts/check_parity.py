"""Compare this code with numbers of the reference implementations.

    python scripts/check_parity.py DIR [CASE ...]

DIR has one folder per case (`case.json`, `data.npz`, `weights.safetensors`, `grads.safetensors`, ...) and the JSON
files of `schedules/` and `optimizer_groups/`. Prints `PASS <case> <worst error>`, `FAIL <case> <array> <error>` or
`not covered <case>` for each, then the counts; exit code 1 if any failed. Everything runs in graph mode. Errors are
max|a-b| / max|b| per array, with the tolerances of the case. The comparisons are in `tests/parity`.

The prefix of a case name selects the comparison. Sizes and options come from the case's arguments and the shapes of its
arrays; if one of them is missing, the case is `not covered <case>: <reason>`. Damaged files count as failures.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mindspore as ms

from tests.parity.common import Case, Findings, UnknownError
from tests.parity.distillation import distilled_student, manifold, manifold_losses
from tests.parity.finetuning import (
    fastmim_ft_swin,
    fastmim_ft_vit,
    simmim_ft,
    train10_fastmim_swin,
    train10_fastmim_vit,
    train10_simmim,
)
from tests.parity.images import evaluation_transform, mixup, randaugment_ops, randaugment_rules, random_erasing
from tests.parity.pretraining import fastmim_swin, fastmim_vit, hog, masks, pos_sincos, simmim
from tests.parity.recipes import (
    GROUP_SOURCES,
    fastmim_schedule,
    full_size,
    manifold_schedule,
    optimizer_groups,
    simmim_schedule,
)
from tests.parity.weights import container, hugging_face, mae, pos_embed, remap, remap_tables, timm

#: prefix of the case name -> comparison; the longest prefix wins
CASES: dict[str, Callable[[Case], Findings]] = {
    "hog_": hog,
    "simmim_": simmim,
    "simmim_ft": simmim_ft,
    "swinv2_simmim": simmim,
    "swinv2_cls": simmim_ft,
    "train10_simmim": train10_simmim,
    "masks": masks,
    "pos_sincos": pos_sincos,
    "mixup": mixup,
    "randaugment_ops": randaugment_ops,
    "fastmim_vit_": fastmim_vit,
    "fastmim_swin_": fastmim_swin,
    "fastmim_ft_vit": fastmim_ft_vit,
    "fastmim_ft_swin": fastmim_ft_swin,
    "train10_fastmim_vit": train10_fastmim_vit,
    "train10_fastmim_swin": train10_fastmim_swin,
    "remap_": remap,
    "remap_simmim_tables": remap_tables,
    "remap_fastmim_tables": remap_tables,
    "pos_embed_": pos_embed,
    "checkpoint_": container,
    "hf_": hugging_face,
    "mae_": mae,
    **{f"timm_{current}{kind}": timm for current in ("", "current_") for kind in ("vit", "deit", "cait", "swin")},
    "random_resized_crop_eval": evaluation_transform,
    "kd_mf_": manifold_losses,
    "kd_full_": manifold,
    "kd_distilled_student": distilled_student,
}
#: folder / prefix of the file name -> comparison of one JSON file
FILES: dict[str, Callable[[Path], Findings]] = {
    "schedules/fastmim": fastmim_schedule,
    "schedules/simmim": simmim_schedule,
    "schedules/manifold_kd": manifold_schedule,
    **{f"optimizer_groups/{source}": optimizer_groups for source in GROUP_SOURCES},
    **{f"full_size/{source}": full_size for source in ("fastmim", "simmim", "timm", "mae", "swin")},
    "augmentation/randaugment": randaugment_rules,
    "augmentation/random_erasing": random_erasing,
}


def plan(folder: Path) -> Iterator[tuple[str, Callable[[], Findings] | None]]:
    """Yield the name of every case below a folder with its comparison, None if there is no comparison."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))):
        files = sorted(path.glob("*.json"))
        if (path / "case.json").exists():
            yield path.name, compare_with(CASES, path.name, path, wrap=Case)
        elif not files or compare_with(CASES, path.name, path):  # a case without case.json
            yield path.name, functools.partial(missing_case, path)
        else:
            for file in files:
                name = f"{path.name}/{file.stem}"
                yield name, compare_with(FILES, name, file)


def missing_case(path: Path) -> Findings:
    raise FileNotFoundError("case.json is missing" if any(path.iterdir()) else "the folder is empty")


def compare_with(table: dict[str, Any], name: str, path: Path, wrap: Callable[[Path], Any] = Path) -> Any:
    """Return the comparison with the longest prefix of `name`, bound to the path; None without one."""
    prefixes = [prefix for prefix in table if name.startswith(prefix)]
    if not prefixes:
        return None
    compare = table[max(prefixes, key=len)]
    return lambda: compare(wrap(path))


def check(name: str, compare: Callable[[], Findings]) -> bool | None:
    """Run one case and print its line; returns whether it passed, None if it lacks what the comparison needs."""
    worst, compared = 0.0, 0
    try:
        for array, error, tolerance in compare():
            if not error <= tolerance:
                print(f"FAIL {name} {array} {error:.3g}", flush=True)
                return False
            worst, compared = max(worst, error), compared + 1
        if not compared:
            raise ValueError("it has nothing to compare")
    except UnknownError as reason:
        print(f"not covered {name}: {' '.join(str(reason).split())[:200]}", flush=True)
        return None
    except Exception as reason:  # a case that cannot run fails; the other cases still run
        print(f"FAIL {name} {type(reason).__name__}: {' '.join(str(reason).split())[:200]}", flush=True)
        return False
    print(f"PASS {name} {worst:.3g}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="compare with reference numbers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", help="only the cases whose name starts with one of these")
    args = parser.parse_args()
    if not args.folder.is_dir():
        print(f"error: {args.folder} is not a folder of reference cases", file=sys.stderr)
        return 2
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    passed = failed = uncovered = 0
    for name, compare in plan(args.folder):
        if args.cases and not name.startswith(tuple(args.cases)):
            continue
        if compare is None:
            uncovered += 1
            print(f"not covered {name}", flush=True)
            continue
        outcome = check(name, compare)
        passed += outcome is True
        failed += outcome is False
        uncovered += outcome is None
    print(f"parity: {passed} passed, {failed} failed, {uncovered} not covered")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
