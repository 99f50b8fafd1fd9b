"""What several test files share: a quiet framework in graph mode on CPU, small image folders, entry points."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # before MindSpore is imported
os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"  # a test compiles what it tests (src/engine/compile_cache.py)

import cv2
import numpy as np
import pytest

from tests.helpers import ROOT, MakeFolder, Run


@pytest.fixture(scope="session")
def graph_mode() -> None:
    """Graph mode on CPU; files that compile ask for it with `pytestmark = pytest.mark.usefixtures("graph_mode")`."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")


def class_picture(label: int, number: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: stripes whose direction tells the class, with noise that tells the picture."""
    rng = np.random.default_rng([label, number])
    rows, cols = np.mgrid[: size[0], : size[1]]
    wave = np.sin((rows * np.cos(label * 0.8) + cols * np.sin(label * 0.8)) * 0.5 + rng.uniform(0, 6))
    grey = 128 + 90 * wave[..., None] + rng.normal(0, 12, (*size, 3))
    return np.clip(grey, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def image_folder_factory() -> MakeFolder:
    """Write root/train/<class>/*.png|jpg and root/val/<class>/*.png|jpg; returns the root."""

    def make(
        root: Path, classes: int = 3, train: int = 8, val: int = 3, size: tuple[int, int] = (40, 48), flat: bool = False
    ) -> Path:
        for split, count in (("train", train), ("val", val)):
            for label in range(classes):
                folder = root / split if flat else root / split / f"class_{label}"
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    suffix = "png" if number % 2 else "jpg"
                    picture = class_picture(label, number + (1000 if split == "val" else 0), size)
                    assert cv2.imwrite(str(folder / f"{label}_{number:02d}.{suffix}"), picture)
        return root

    return make


@pytest.fixture(scope="session")
def run_entry() -> Run:
    """Run `python ARGUMENTS` in the repository root as a process of its own."""

    def run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def library() -> str:
    """Path of the compiled library of `src.data.resample` and `affine`."""
    from src.data import resample

    return resample.library() or pytest.skip(f"no library: {resample.set_up('')}")


#: very small networks of each kind, with stochastic depth so that its draw counters are in the training state
TINY = {
    "vit": "{name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, drop_path: 0.2}",
    "swin": "{name: swin, image_size: 32, embed_dim: 16, depths: [2, 1], num_heads: [2, 4], window_size: 4, "
    "drop_path: 0.2}",
    "cait": "{name: cait, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, depth_token_only: 1, num_heads: 2, "
    "layer_scale: 0.5, drop_path: 0.2}",
}
#: how each is pooled
POOLING = {
    "vit": "pool: mean, fc_norm: true",
    "swin": "pool: mean, fc_norm: false",
    "cait": "pool: cls, fc_norm: false",
}
TINY_RECIPE = """
encoder: {encoder}
method: {{name: classify, num_classes: 6, {pooling}}}
data: {{root: {root}, workers: 0}}
train: {{epochs: 16, batch_size: 12, base_lr: 5e-3, lr_batch: 0, log_every: 4, eval_every: 0}}
device: CPU
output: {output}
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(tmp_path_factory.mktemp("tiny") / "stripes", classes=6, train=12, val=4)


@pytest.fixture(scope="session")
def compiled() -> None:
    """Fixtures that compile graphs request this one; `--fast` leaves out the tests that use them."""


@pytest.fixture(scope="session")
def tiny_run(
    graph_mode: None, compiled: None, tmp_path_factory: pytest.TempPathFactory, tiny_data: Path
) -> Callable[[str], Path]:
    """The last checkpoint of a short fine-tuning run of a kind of `TINY`, trained once."""
    from src.config.files import load_recipe
    from src.tasks.train import train

    @functools.cache
    def run(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        output = folder / f"{kind}_run"
        recipe = folder / "recipe.yaml"
        text = TINY_RECIPE.format(encoder=TINY[kind], pooling=POOLING[kind], root=tiny_data, output=output)
        recipe.write_text(text, encoding="utf-8")
        train(load_recipe(recipe))
        return output / "last.ckpt"

    return run


@pytest.fixture(scope="session")
def fine_tuned(tiny_run: Callable[[str], Path]) -> Path:
    """A fine-tuned Swin (CaiT's is in test_cait.py; the README's commands evaluate, export and publish a ViT)."""
    return tiny_run("swin")


@pytest.fixture(scope="session")
def one_fine_tuned(tiny_run: Callable[[str], Path]) -> Path:
    """A fine-tuned checkpoint, where its kind does not matter."""
    return tiny_run("vit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only the tests that compile no graph")
    parser.addoption("--all", action="store_true", help="every combination of the walk in test_pairs.py")


#: files that take longest; they start first, so that no process waits for the other at the end
LONGEST = (
    *("test_launchers", "test_pairs", "test_end_to_end", "test_stages", "test_cait", "test_readme", "test_teacher"),
    *("test_same_figures", "test_parity", "test_written_before", "test_deploy", "test_run_folder", "test_manifold"),
    *("test_kernel_forms", "test_no_copies", "test_compile_cache", "test_own_images", "test_weights", "test_bands"),
    *("test_mixing", "test_models", "test_dataset_tools", "test_workers"),
)


def compiles(item: pytest.Item) -> bool:
    """Whether a test has the marker `compiles` or uses a fixture that requests `compiled`."""
    return item.get_closest_marker("compiles") is not None or "compiled" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if compiles(item)])
        items[:] = [item for item in items if not compiles(item)]
