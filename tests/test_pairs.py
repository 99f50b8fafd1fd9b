"""Every two values of encoder, target, decoder and corruption meet in a run that trains, saves, draws and loads.

`--all` runs every combination.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from src import load_encoder
from src.config import (
    CaiTConfig,
    DataConfig,
    FeaturesConfig,
    HOGConfig,
    LinearDecoderConfig,
    MAEConfig,
    ManifoldConfig,
    MIMConfig,
    PixelsConfig,
    Recipe,
    SwinConfig,
    SwinV2Config,
    TrainConfig,
    TransformerDecoderConfig,
    ViTConfig,
)
from src.config.files import parse_recipe
from src.engine import checkpoint
from src.methods import build_method
from src.tasks.train import train

pytestmark = pytest.mark.usefixtures("graph_mode")

#: one block, which compiles fast
ENCODERS: dict[str, Any] = {
    "vit": replace(ViTConfig.tiny(), depth=1),
    "cait": replace(CaiTConfig.tiny(), depth=1),
    "swin": replace(SwinConfig.tiny(), patch_size=8, embed_dim=32, depths=(1,), num_heads=(2,)),
    "swinv2": replace(SwinV2Config.tiny(), patch_size=8, embed_dim=32, depths=(1,), num_heads=(2,)),
}
TARGETS: dict[str, Any] = {
    "hog": HOGConfig(cell=4),
    "pixels": PixelsConfig(normalize="local", window=5),
    "features": FeaturesConfig(),  # the test names the teacher
}
DECODERS: dict[str, Any] = {
    "transformer": TransformerDecoderConfig(width=32, depth=1),
    "linear": LinearDecoderConfig(),
}
#: what is corrupted -> configuration; MAE drops tokens
CORRUPTIONS: dict[str, Any] = {
    "pixel": MIMConfig(mask_block=8, corrupt="pixel"),
    "token": MIMConfig(mask_block=8, corrupt="token", loss="l1", mask_rounding="ceil_masked", origin="simmim"),
    "drop": MAEConfig(mask_block=8),
}
FACTORS = (ENCODERS, TARGETS, DECODERS, CORRUPTIONS)


def legal(case: tuple[str, ...]) -> bool:
    encoder, _, decoder, corruption = case
    return corruption != "drop" or (ENCODERS[encoder].drops_tokens and decoder == "transformer")


def pairs(case: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


ALL = [case for case in itertools.product(*FACTORS) if legal(case)]


def pairwise() -> list[tuple[str, ...]]:
    """Cases that hold every pair of values that any case holds; the one with most new pairs first."""
    left = set().union(*(pairs(case) for case in ALL))
    chosen = []
    while left:
        best = max(ALL, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all") else pairwise()
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


def test_the_pairs_are_all_there() -> None:
    chosen = pairwise()
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, ALL))
    assert len(chosen) < len(ALL) / 2


def teacher_of(path: Path) -> dict[str, Any]:
    recipe = parse_recipe(checkpoint.load(path).meta["recipe"], str(path))
    return {"teacher": str(path), "teacher_encoder": recipe.encoder}


def two_steps(encoder: Any, method: Any, data: Path, output: Path) -> Recipe:
    return Recipe(
        encoder=encoder,
        method=method,
        data=DataConfig(root=str(data), val="", workers=0),
        train=TrainConfig(epochs=1, batch_size=36, base_lr=1e-3, lr_batch=0, log_every=1),
        device="CPU",
        output=str(output),
    )


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


def trained_and_loaded(recipe: Recipe) -> None:
    """Two steps with finite figures, a checkpoint that fits a network built anew, and an encoder made from it."""
    output = Path(recipe.output)
    train(recipe)
    steps = lines_of(output)
    assert len(steps) == 2 and all(np.isfinite(line["loss"]) and line["baseline"] > 0 for line in steps)
    found = checkpoint.load(output / "last.ckpt")
    method = build_method(recipe)
    checkpoint.assign(checkpoint.weights_of(method), found.weights, found.path)
    loaded = checkpoint.weights_of(load_encoder(output / "last.ckpt"))
    assert {name for name in found.weights if name.startswith("encoder.")} == set(loaded)
    for name, parameter in loaded.items():
        np.testing.assert_array_equal(parameter.asnumpy(), found.weights[name])


def test_a_masked_run(case: tuple[str, ...], tiny_data: Path, tiny_run: Callable[[str], Path], tmp_path: Path) -> None:
    encoder, target, decoder, corruption = (factor[name] for factor, name in zip(FACTORS, case, strict=True))
    if case[1] == "features":
        target = replace(target, **teacher_of(tiny_run("vit")))
    method = replace(corruption, target=target, decoder=decoder)
    trained_and_loaded(two_steps(encoder, method, tiny_data, tmp_path / "run"))
    (picture,) = (tmp_path / "run" / "gallery").iterdir()
    image = cv2.imread(str(picture))
    assert image.shape[0] > 400 and image.std() > 10
    assert "no gallery" not in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("student", ["swinv2"])  # the others have tests of their own
def test_a_distillation(student: str, tiny_data: Path, tiny_run: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = ENCODERS[student]
    pool: Any = "cls" if encoder.num_prefix_tokens else "mean"
    shared: dict[str, Any] = {"num_classes": 6, "pool": pool, "fc_norm": False, "mixup": 0.8}
    last = len(encoder.block_maps) - 1  # has the teacher's map
    method = ManifoldConfig(**shared, **teacher_of(tiny_run("vit")), student_layers=(last,), teacher_layers=(1,))
    trained_and_loaded(two_steps(encoder, method, tiny_data, tmp_path / "run"))
    assert not (tmp_path / "run" / "gallery").exists()
