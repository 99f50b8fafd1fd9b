"""Cards, assets and folders for MindSpore Hub: its rules, and its loading steps one by one."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from hub import publish
from hub.check_card import REQUIRED, RULES, CardError, check_card, file_hash, models_of, read_card
from src import load_model
from src.config import ClassifyConfig
from src.config.files import dump_recipe, load_recipe
from src.engine import checkpoint
from src.tasks.evaluate import evaluate_checkpoint
from src.tasks.networks import MODELS, create_model, model_names
from tests.helpers import ROOT, Run, assert_one_line_error

pytestmark = pytest.mark.usefixtures("graph_mode")

#: type of the fixture `load`
Load = Callable[..., subprocess.CompletedProcess[str]]

#: what mindspore_hub.load(card, source="local") does, step by step; the class of errors is ours
LOAD = """
import hashlib, importlib.util, sys
from pathlib import Path
import mindspore as ms, numpy as np, yaml

card, images, output, other, when = Path(sys.argv[1]).resolve(), *sys.argv[2:]

def load_other():
    sys.path.insert(0, other)
    import src, src.network
    assert src.WHO == src.network.WHO == "another zoo model", src.__file__

if when == "before":
    load_other()

lines = card.read_text().splitlines()
first, last = [number for number, line in enumerate(lines) if line.startswith("---")]
header = yaml.load("\\n".join(lines[first + 1 : last]), Loader=yaml.FullLoader)

project = card.parent / header["repo-link"].rsplit("/")[-1].strip("<>")
assert project.is_dir(), f"{project}: the hub would download {header['repo-link']}"
sys.path.insert(0, str(project))
spec = importlib.util.spec_from_file_location("mindspore_hub_conf.py", project / "mindspore_hub_conf.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
network = module.create_network(header["model-name"].lower())
assert isinstance(network, ms.nn.Cell), type(network)

chosen = [item for item in header["asset"] if item["file-format"].lower() == "ckpt"][-1]
file = card.parent / chosen["asset-link"].strip("<>").split("/")[-1]
assert hashlib.sha256(file.read_bytes()).hexdigest() == chosen["asset-sha256"], "asset-sha256"
missing = ms.load_param_into_net(network, ms.load_checkpoint(str(file)))[0]
assert not missing, f"no weights for {missing}"

if when == "after":
    load_other()
network.set_train(False)
np.save(output, network(ms.Tensor(np.load(images))).asnumpy())
assert sys.modules["src"].WHO == "another zoo model"
assert not hasattr(sys.modules["src"], "load_model")
"""


def arguments(**changes: str) -> argparse.Namespace:
    """publish.py's options."""
    values = {"name": "", "dataset": "", "backend": "", "asset_url": "", "repo_link": publish.ZOO}
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture(scope="module")
def published(fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a published checkpoint, in its folder."""
    return publish.publish(str(fine_tuned), tmp_path_factory.mktemp("hub") / "local", True, arguments())


@pytest.fixture(scope="module")
def one_published(one_fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish.publish(str(one_fine_tuned), tmp_path_factory.mktemp("hub") / "local", True, arguments())


@pytest.fixture
def copied(one_published: Path, tmp_path: Path) -> Path:
    """A card in a copy of its folder, to be broken."""
    shutil.copytree(one_published.parent, tmp_path / "copy")
    return tmp_path / "copy" / one_published.name


def asset_of(card: Path) -> Path:
    (asset,) = card.parent.glob("*.ckpt")
    return asset


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Follow the hub's steps in a process that has, or gets, another package called src."""
    folder = tmp_path_factory.mktemp("loader")
    (folder / "load.py").write_text(LOAD)
    (folder / "other" / "src").mkdir(parents=True)
    for name in ("__init__.py", "network.py"):
        (folder / "other" / "src" / name).write_text('WHO = "another zoo model"\n')

    def run(card: Path, images: Path, output: Path, when: str = "before") -> subprocess.CompletedProcess[str]:
        words = [sys.executable, folder / "load.py", card, images, output, folder / "other", when]
        return subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, np.random.default_rng(5).standard_normal((4, 3, 32, 32)).astype(np.float32))
    return path


# --- loading ----------------------------------------------------------------------------------------------------


def test_the_hubs_steps_give_the_checkpoints_network(
    fine_tuned: Path,
    published: Path,
    images: Path,
    tmp_path: Path,
    load: Load,
) -> None:
    """Equal logits, whichever of two zoo models comes first; the network runs in MindSpore's default mode there."""
    when = "before" if "vit" in published.name else "after"
    done = load(published, images, tmp_path / "logits.npy", when)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "logits.npy")
    expected = load_model(fine_tuned)(Tensor(np.load(images))).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_the_asset_is_a_checkpoint_without_training_state(fine_tuned: Path, published: Path, tiny_data: Path) -> None:
    before, after = checkpoint.load(fine_tuned), checkpoint.load(asset_of(published))
    assert before.state and not after.state
    assert set(after.weights) == set(before.weights)
    for name, value in after.weights.items():
        np.testing.assert_array_equal(value, before.weights[name])
    assert str(tiny_data.parent) not in after.meta["recipe"] and str(fine_tuned.parent) not in after.meta["recipe"]
    assert "data/stripes" in after.meta["recipe"]


def test_the_asset_evaluates_as_the_checkpoint(one_fine_tuned: Path, one_published: Path, tiny_data: Path) -> None:
    metrics = checkpoint.load(one_fine_tuned).meta["metrics"]
    result = evaluate_checkpoint(str(asset_of(one_published)), str(tiny_data / "val"), [])
    assert {key: result[key] for key in metrics} == metrics


@pytest.mark.compiles
def test_a_renamed_parameter_is_seen(copied: Path, images: Path, load: Load) -> None:
    """By publish.py's check and by the steps above; the hub itself would load the rest and say nothing."""
    asset = asset_of(copied)
    weights = ms.load_checkpoint(str(asset))
    items = [{"name": name.replace("head.weight", "head.weights"), "data": value} for name, value in weights.items()]
    asset.unlink()
    ms.save_checkpoint([item for item in items if item["name"] != "meta"], str(asset), crc_check=True)
    card = read_card(copied, [])
    with pytest.raises(CardError, match=r"asset: .*\['head\.weight'\].*\['head\.weights'\]"):
        publish.check_weights(card, publish.entry_point(copied.parent / "models").create_network(copied.stem[:7]))
    copied.write_text(copied.read_text().replace(card.header["asset"][0]["asset-sha256"], file_hash(asset)))
    done = load(copied, images, copied.parent / "logits.npy")
    assert done.returncode == 1 and "no weights for ['head.weight']" in done.stderr


@pytest.mark.compiles
def test_a_changed_asset_is_seen(copied: Path, images: Path, load: Load) -> None:
    content = bytearray(asset_of(copied).read_bytes())
    content[len(content) // 2] ^= 1
    asset_of(copied).write_bytes(content)
    with pytest.raises(CardError, match=r"asset-sha256: .* has "):
        check_card(copied, models_of(copied.parent / "models"))
    done = load(copied, images, copied.parent / "logits.npy")
    assert done.returncode == 1 and "asset-sha256" in done.stderr


# --- rules ------------------------------------------------------------------------------------------------------

#: rule -> what is replaced in a good card, and by what; the first entries are what the published cards get wrong
BREAKS: list[tuple[str, str, str]] = [
    ("yaml", "accuracy: ", "accuracy: vit-base: 83.78 / swin-base: "),
    ("yaml", "  asset-sha256", "  asset-link: <https://download.mindspore.cn/x.ckpt>\n  asset-sha256"),
    ("accuracy", "accuracy: ", "accuracy: top1 "),
    ("required", "repo-link: ", "vit-repo-link: "),
    ("colon", "user-id: ", "swin-link: https://gitee.com/a/b\n\nuser-id: "),
    ("asset", "  asset-sha256: ", "  asset_sha256: "),
    ("backbone-name", "backbone-name: vit", "backbone-name: vit/swin_transformer"),
    ("model-name", "model-name: vit_run", "model-name: Manifold KD"),
    ("user-id", "user-id: mindspore-mim", "user-id: Noah's Ark Lab"),
    ("brackets", "<https://gitee.com/mindspore/models>", "https://gitee.com/mindspore/models"),
    ("sections", "## Usage", "## Use"),
    ("sections", "## Preprocessing", "## Input"),
    ("asset-link", "vit_run_cpu", "vit_run_ascend"),
    ("asset-link", "train-backend: cpu", "train-backend: gpu"),
    ("asset-link", "_v2100_stripes_", "_v2100_imagenet2012_"),
    ("frame", "## Introduction", "---\n\n## Introduction"),
    ("frame", "# vit_run\n\n---", "# vit_run\n"),
    ("yaml", "fine-tunable: true", "fine-tunable: [true"),
    ("module-type", "cv-classification", "vision"),
    ("module-type", "cv-classification", "cv-image-classification"),
    ("fine-tunable", "fine-tunable: true", "fine-tunable: maybe"),
    ("repo-link", "<https://gitee.com/mindspore/models>", "<https://gitee.com/mindspore/models/>"),
    ("repo-link", "<https://gitee.com/mindspore/models>", "<https://example.org/mindspore/models>"),
    ("repo-link", "<https://gitee.com/mindspore/models>", "<https://gitee.com/mindspore/models/raw/master/x>"),
    ("train-dataset", "accuracy: ", "train-dataset: NWPU-RESISC45\n\naccuracy: "),
    ("file name", "accuracy: ", "train-dataset: cifar10\n\naccuracy: "),
    ("used-for", "inference/transfer-learning", "inference/fun"),
    ("backend", "infer-backend: cpu", "infer-backend: cpu/tpu"),
    ("input-shape", "input-shape: [3, 32, 32]", "input-shape: 3x32x32"),
    ("allow-cache-ckpt", "user-id: ", "allow-cache-ckpt: sometimes\n\nuser-id: "),
    ("featured-image", "user-id: ", "featured-image: gallery.png\n\nuser-id: "),
    ("colon", "summary: ", "summary: 'Classifier: '#"),
    ("heading", "## Usage\n", "## Usage\n\n### Example:\n"),
    ("heading", "## Usage\n", "## Usage\n\nExample:\n========\n"),
    ("asset", "- file-format: ckpt", "- file-format: pth"),
    ("asset", "asset:\n- file", "asset:\n  file"),
    ("one asset", "- file-format: ckpt", "- file-format: mindir"),
    ("one asset", "asset:\n", "asset:\n- {file-format: ckpt, asset-link: <file:///a.ckpt>, asset-sha256: 'a'}\n"),
    ("asset-sha256", '  asset-sha256: "', '  asset-sha256: "0'),
    ("version", 'mindspore-version: "2.10"', "mindspore-version: 2.10"),
    *[
        ("required", f"\n{key}: ", f"\nno-{key}: ")
        for key in REQUIRED
        if key != "repo-link"  # above
    ],
]


@pytest.mark.parametrize(("rule", "good", "bad"), BREAKS, ids=[f"{rule} {n}" for n, (rule, _, _) in enumerate(BREAKS)])
def test_a_broken_rule_is_named(copied: Path, rule: str, good: str, bad: str) -> None:
    models = models_of(copied.parent / "models")
    check_card(copied, models)
    text = copied.read_text(encoding="utf-8")
    assert good in text
    copied.write_text(text.replace(good, bad, 1), encoding="utf-8")
    with pytest.raises(CardError) as raised:
        check_card(copied, models)
    assert str(raised.value).startswith(f"{copied}: {rule}: ")


def test_a_card_under_another_name_is_refused(copied: Path) -> None:
    for name in ("vit_run_v1.0_stripes.md", "vit.md", "vit_run_stripes.txt"):
        renamed = copied.rename(copied.with_name(name))
        with pytest.raises(CardError, match="file name: "):
            check_card(renamed, models_of(copied.parent / "models"))
        renamed.rename(copied)


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in BREAKS} == {*RULES, "frame", "yaml"}


# --- the cards of this repository -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_names())
def test_each_model_has_a_card_that_keeps_the_rules(name: str) -> None:
    card = check_card(ROOT / "hub" / f"{name}_imagenet2012.md", model_names())
    assert "asset" not in card.header and "accuracy" not in card.header  # nothing is trained or uploaded yet
    assert (ROOT / "hub" / f"{name}_imagenet2012.md").read_text(encoding="utf-8") == publish.card_of(name)


def test_there_are_no_other_cards() -> None:
    cards = {path.stem.removesuffix("_imagenet2012") for path in (ROOT / "hub").glob("*_*.md")}
    assert cards == set(model_names())


def test_check_card_on_the_command_line(copied: Path, run_entry: Run) -> None:
    done = run_entry("hub/check_card.py", ROOT / "hub" / "fastmim_vit_base_imagenet2012.md", copied)
    assert done.returncode == 0 and done.stdout.count("passes all rules") == 2, done.stderr
    copied.write_text(copied.read_text().replace("license: ", "licence: "))
    assert_one_line_error(run_entry("hub/check_card.py", copied), f"{copied}: required: license missing")


# --- publishing -------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(one_fine_tuned: Path, one_published: Path, run_entry: Run) -> None:
    before = {path: path.read_bytes() for path in one_published.parent.glob("*.*")}
    done = run_entry("hub/publish.py", one_fine_tuned, "--local", one_published.parent)
    assert_one_line_error(done, f"{one_published.parent}: exists and is not overwritten")
    assert {path: path.read_bytes() for path in one_published.parent.glob("*.*")} == before


def test_a_refused_publication_leaves_nothing(one_fine_tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(CardError, match="repo-link: "):
        publish.publish(str(one_fine_tuned), tmp_path / "x", True, arguments(repo_link="https://example.org/a/b"))
    assert list(tmp_path.iterdir()) == []


def test_a_publication_for_upload(one_fine_tuned: Path, tmp_path: Path) -> None:
    """Without --local: card, asset under the given address, and the recipe of a network that the project lacks."""
    options = arguments(
        name="stripes_tiny", dataset="cifar10", backend="ascend", asset_url="https://files.example.com/v1/"
    )
    card = publish.publish(str(one_fine_tuned), tmp_path / "upload", False, options)
    assert card.name == "stripes_tiny_cifar10.md"
    top1 = 100 * checkpoint.load(one_fine_tuned).meta["metrics"]["top1"]
    name = f"stripes_tiny_ascend_v{ms.__version__.replace('.', '')}_cifar10_research_cv_top1acc{top1:.2f}.ckpt"
    assert sorted(path.name for path in card.parent.iterdir()) == sorted([card.name, name, "stripes_tiny.yaml"])
    (item,) = read_card(card, []).header["asset"]
    assert item["asset-link"] == f"<https://files.example.com/v1/{name}>"
    assert item["asset-sha256"] == file_hash(card.parent / name)
    recipe = load_recipe(card.parent / "stripes_tiny.yaml")
    assert isinstance(recipe.method, ClassifyConfig) and recipe.method.num_classes == 6


def test_a_model_of_the_project_is_laid_out_without_weights(tmp_path: Path) -> None:
    card = publish.publish("manifold_kd_deit_tiny", tmp_path / "named", True, arguments())
    assert card.read_text(encoding="utf-8").count("pretrained=False") == 2
    assert models_of(card.parent / "models") == model_names()
    network = publish.entry_point(card.parent / "models").create_network("MANIFOLD_KD_DEIT_TINY", depth=1)
    assert type(network).__module__.startswith("mindspore_mim_")


def test_a_trained_model_of_the_project_is_published_under_its_name(tmp_path: Path) -> None:
    """The card says how this asset was trained, besides the authors' recipe."""
    changes = ["train.epochs=7", "device=GPU", "data.root=photos/imagenet"]
    recipe = load_recipe(MODELS / "manifold_kd_deit_tiny.yaml", changes)
    classes = [f"n{number:08d}" for number in range(1000)]
    meta = {"recipe": dump_recipe(recipe), "method": "classify", "classes": classes, "epoch": 7, "step": 7, "best": 0.5}
    meta["metrics"] = {"loss": 1.0, "top1": 0.5, "top5": 0.75, "count": 50000}
    network = create_model("manifold_kd_deit_tiny")
    checkpoint.save(tmp_path / "trained.ckpt", checkpoint.weights_of(network), {}, meta)
    card = publish.publish(str(tmp_path / "trained.ckpt"), tmp_path / "hub", True, arguments())
    assert card.name == "manifold_kd_deit_tiny_imagenet2012.md"
    digits = ms.__version__.replace(".", "")
    name = f"manifold_kd_deit_tiny_gpu_v{digits}_imagenet2012_research_cv_top1acc50.00.ckpt"
    assert asset_of(card).name == name
    header = read_card(card, []).header
    assert header["evaluation"] == "top1acc50.00 | top5acc75.00" and header["train-dataset"] == "imagenet2012"
    text = card.read_text(encoding="utf-8")
    assert "- 7 epochs" in text and "The original authors' recipe:" in text and publish.UNRUN not in text
    assert models_of(card.parent / "models") == model_names()


def checkpoint_of(recipe_file: Path, *changes: str) -> checkpoint.Checkpoint:
    """What publishing reads of a checkpoint before its weights."""
    recipe = load_recipe(recipe_file, list(changes))
    meta = {"recipe": dump_recipe(recipe), "classes": [], "metrics": {}, "versions": {"mindspore": "2.10.0"}}
    shapes = [*recipe.encoder_shapes(), *recipe.method.weight_shapes(recipe.trained_encoder)]
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes}  # without memory
    return checkpoint.Checkpoint(Path("run/last.ckpt"), meta, weights, {}, {})


def test_a_published_network_is_recognised() -> None:
    changes = ("encoder.drop_path=0.2", "method.label_smoothing=0.2", "method.mixup=0.8")
    found = checkpoint_of(MODELS / "simmim_swin_large.yaml", *changes)
    assert publish.trained_network(found, "").model == "simmim_swin_large"
    ambiguous = checkpoint_of(MODELS / "fastmim_swin_base.yaml")
    with pytest.raises(CardError, match="is the network of fastmim_swin_base and simmim_swin_base; choose with --name"):
        publish.trained_network(ambiguous, "")
    assert publish.trained_network(ambiguous, "simmim_swin_base").model == "simmim_swin_base"
    other = checkpoint_of(MODELS / "fastmim_vit_base.yaml", "method.num_classes=37", "output=runs/My-Birds")
    assert publish.trained_network(other, "").model == "my_birds" and publish.trained_network(other, "").unlisted
    with pytest.raises(CardError, match="is not the network of fastmim_vit_base"):
        publish.trained_network(other, "fastmim_vit_base")


def test_a_network_of_five_bands(tmp_path: Path) -> None:
    changes = ("encoder.in_chans=5", f"data.mean={[0.1] * 5}", f"data.std={[0.2] * 5}", "output=runs/bands")
    network = publish.trained_network(checkpoint_of(MODELS / "fastmim_vit_base.yaml", *changes), "")
    publish.write_model(tmp_path, network)
    recipe = load_recipe(tmp_path / "bands.yaml")
    assert recipe.encoder.in_chans == 5 and recipe.data.std == (0.2,) * 5
    text = publish.preprocessing_text(recipe)
    assert text.startswith("5 bands; short side") and "Input (batch, 5, " in text and "RGB" not in text


def test_what_a_checkpoint_must_say(tmp_path: Path) -> None:
    found = checkpoint_of(MODELS / "fastmim_vit_base.yaml")
    network = publish.trained_network(found, "")
    with pytest.raises(CardError, match=r"no accuracy.*publish best\.ckpt"):
        publish.make_asset(found, network, "imagenet2012", tmp_path, tmp_path, arguments())
    with pytest.raises(CardError, match=r"--backend: .*run/last\.ckpt"):
        publish.backend_of(found, network.recipe, "")
    assert publish.dataset_of(network.recipe, "") == "imagenet2012"
    with pytest.raises(CardError, match="--dataset: 'ImageNet-1k'"):
        publish.dataset_of(network.recipe, "ImageNet-1k")
