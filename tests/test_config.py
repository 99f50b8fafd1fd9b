"""Recipes: inheritance, overrides, presets, typed values, and key and remedy of every error message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from src.config import (
    ENCODERS,
    ClassifyConfig,
    DataConfig,
    HOGConfig,
    MIMConfig,
    PixelsConfig,
    RandAugmentConfig,
    Recipe,
    TrainConfig,
    TransformerDecoderConfig,
    ViTConfig,
    parse_auto_augment,
)
from src.config.files import ConfigError, dump_recipe, load_recipe, override, parse_recipe
from tests.helpers import Run, assert_one_line_error

Write = Callable[[str, str], Path]

ENCODER_KEYS = ", ".join(field.name for field in dataclasses.fields(ViTConfig))
ENCODER_NAMES = ", ".join(ENCODERS)
DATA_KEYS = ", ".join(field.name for field in dataclasses.fields(DataConfig))
RECIPE_KEYS = "encoder, method, data, train, stages, seed, device, output, init_from"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def message(path: Path, *overrides: str) -> str:
    """The text of the error a recipe gives, with the file's own path written as FILE."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(path), "FILE")


# --- inheritance ------------------------------------------------------------------------------------------------


def test_an_empty_file_gives_the_defaults(write: Write) -> None:
    assert load_recipe(write("mine.yaml", "")) == dataclasses.replace(Recipe(), output="runs/mine")


def test_a_chain_of_bases_merges_deeply_and_the_child_wins(write: Write) -> None:
    write("grand/a.yaml", "train: {epochs: 10, batch_size: 4, eps: 1e-6}\nseed: 7\n")
    write("b.yaml", "base: grand/a.yaml\ntrain: {epochs: 20}\ndata: {hflip: 0.25}\n")
    recipe = load_recipe(write("c.yaml", "base: b.yaml\ntrain: {batch_size: 8}\n"))
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.eps) == (20, 8, 1e-6)
    assert (recipe.seed, recipe.data.hflip) == (7, 0.25)


def test_of_several_bases_the_later_one_wins(write: Write) -> None:
    write("a.yaml", "seed: 1\ntrain: {epochs: 10, batch_size: 4}\n")
    write("b.yaml", "seed: 2\ntrain: {epochs: 20}\n")
    recipe = load_recipe(write("c.yaml", "base: [a.yaml, b.yaml]\n"))
    assert (recipe.seed, recipe.train.epochs, recipe.train.batch_size) == (2, 20, 4)


def test_lists_are_replaced_not_merged(write: Write) -> None:
    write("a.yaml", "encoder: {in_chans: 3}\ndata: {mean: [0.1, 0.2, 0.3], std: [1, 1, 1]}\n")
    recipe = load_recipe(write("b.yaml", "base: a.yaml\nencoder: {in_chans: 1}\ndata: {mean: [0.5], std: [0.25]}\n"))
    assert recipe.data.mean == (0.5,) and recipe.data.std == (0.25,)


def test_the_output_folder_is_named_after_the_file_unless_it_is_set(write: Write) -> None:
    assert load_recipe(write("deep/one.yaml", "seed: 1\n")).output == "runs/one"
    assert load_recipe(write("deep/two.yaml", "output: elsewhere\n")).output == "elsewhere"


# --- overrides and presets --------------------------------------------------------------------------------------


def test_overrides_take_the_same_typed_path(write: Write) -> None:
    path = write("a.yaml", "train: {epochs: 10}\n")
    recipe = load_recipe(
        path,
        [
            "train.epochs=3",
            "train.base_lr=1e-3",
            "train.betas=[0.9, 0.95]",
            "encoder.image_size=[32, 64]",
            "output=x=y",
        ],
    )
    assert recipe.train.epochs == 3 and recipe.train.base_lr == 1e-3 and recipe.train.betas == (0.9, 0.95)
    assert recipe.encoder.image_size == (32, 64)
    assert recipe.output == "x=y"  # only the first equals sign separates


def test_the_last_override_wins_over_file_and_earlier_ones(write: Write) -> None:
    assert load_recipe(write("a.yaml", "seed: 1\n"), ["seed=2", "seed=3"]).seed == 3


def test_a_preset_with_changed_fields(write: Write) -> None:
    recipe = load_recipe(write("a.yaml", "encoder: {name: vit_small, image_size: 128, depth: 3}\n"))
    assert recipe.encoder == dataclasses.replace(
        ENCODERS["vit_small"], name="vit_small", image_size=(128, 128), depth=3
    )


def test_a_plain_string_names_a_preset(write: Write) -> None:
    recipe = load_recipe(write("a.yaml", "encoder: vit_tiny\nmethod: {name: fastmim, target: pixels}\n"))
    assert (recipe.encoder.name, recipe.encoder.embed_dim, recipe.encoder.num_heads) == ("vit_tiny", 192, 3)
    assert isinstance(recipe.method, MIMConfig) and recipe.method.target == PixelsConfig()


def test_fields_without_a_name_change_the_default_preset(write: Write) -> None:
    recipe = load_recipe(write("a.yaml", "method: {target: {bins: 6}, decoder: {depth: 2}}\n"))
    assert isinstance(recipe.method, MIMConfig)
    assert recipe.method.target == HOGConfig(bins=6)
    assert recipe.method.decoder == TransformerDecoderConfig(depth=2)


def test_a_child_changes_fields_of_a_base_preset_given_as_a_string(write: Write) -> None:
    write("a.yaml", "encoder: vit_demo\n")
    recipe = load_recipe(write("b.yaml", "base: a.yaml\nencoder: {drop_path: 0.1}\n"))
    assert recipe.encoder == dataclasses.replace(ENCODERS["vit_demo"], name="vit_demo", drop_path=0.1)


def test_an_override_changes_a_field_of_a_preset_given_as_a_string(write: Write) -> None:
    recipe = load_recipe(write("a.yaml", "encoder: vit_demo\n"), ["encoder.drop_path=0.1"])
    assert recipe.encoder == dataclasses.replace(ENCODERS["vit_demo"], name="vit_demo", drop_path=0.1)


def test_a_plain_string_in_the_child_drops_the_base_fields(write: Write) -> None:
    write("a.yaml", "encoder: {name: vit_demo, depth: 2}\n")
    recipe = load_recipe(write("b.yaml", "base: a.yaml\nencoder: vit_demo\n"))
    assert recipe.encoder.depth == ENCODERS["vit_demo"].depth


def test_another_preset_of_the_same_class_keeps_the_base_fields(write: Write) -> None:
    write("a.yaml", "encoder: {name: vit_base, image_size: 128}\n")
    recipe = load_recipe(write("b.yaml", "base: a.yaml\nencoder: {name: vit_small}\n"))
    assert (recipe.encoder.embed_dim, recipe.encoder.image_size) == (384, (128, 128))


@pytest.mark.parametrize("way", ["child", "override"])
def test_switching_to_a_preset_of_another_class_drops_the_old_keys(write: Write, way: str) -> None:
    base = write("a.yaml", "method: {name: fastmim, mask_block: 32, target: {name: hog, bins: 6}}\n")
    if way == "child":
        child = "base: a.yaml\nmethod: {name: classify, num_classes: 5}\n"
        recipe = load_recipe(write("b.yaml", child))
    else:
        recipe = load_recipe(base, ["method.name=classify", "method.num_classes=5"])
    assert recipe.method == ClassifyConfig(num_classes=5)


@pytest.mark.parametrize("way", ["child", "override"])
def test_switching_a_nested_preset_keeps_the_rest_of_its_parent(write: Write, way: str) -> None:
    base = write("a.yaml", "method: {name: fastmim, mask_block: 32, target: {name: hog, bins: 6}}\n")
    if way == "child":
        recipe = load_recipe(write("b.yaml", "base: a.yaml\nmethod: {target: {name: pixels, normalize: patch}}\n"))
    else:
        recipe = load_recipe(base, ["method.target.name=pixels", "method.target.normalize=patch"])
    assert recipe.method == MIMConfig(mask_block=32, target=PixelsConfig(normalize="patch"))


# --- typed values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'0.001'"])
def test_numbers_are_floats_however_they_are_written(write: Write, text: str) -> None:
    assert load_recipe(write("a.yaml", f"train: {{base_lr: {text}}}\n")).train.base_lr == 0.001


def test_a_whole_number_is_a_float_where_one_is_wanted(write: Write) -> None:
    value = load_recipe(write("a.yaml", "train: {warmup_epochs: 5}\n")).train.warmup_epochs
    assert type(value) is float and value == 5.0


def test_one_number_is_a_square_image(write: Write) -> None:
    assert load_recipe(write("a.yaml", "encoder: {image_size: 64}\n")).encoder.image_size == (64, 64)


def test_dump_and_parse_give_an_equal_recipe(write: Write) -> None:
    path = write(
        "a.yaml",
        "encoder: {name: vit_demo, image_size: [32, 64], in_chans: 1, drop_path: 0.1}\n"
        "method: {name: fastmim, mask_block: 8, target: {name: pixels, normalize: patch}, decoder: {width: 64}}\n"
        "data: {mean: [0.5], std: [0.1], root: 'a: b'}\n"
        "train: {epochs: 3, base_lr: 1e-7, betas: [0.9, 0.95]}\ndevice: CPU\nseed: 4\n",
    )
    recipe = load_recipe(path)
    assert recipe != load_recipe(path, ["seed=5"])  # equality can fail
    assert parse_recipe(dump_recipe(recipe), "text") == recipe


def test_override_of_a_built_recipe_equals_the_override_of_its_file(write: Write) -> None:
    path = write("a.yaml", "encoder: vit_demo\nmethod: {name: fastmim, mask_block: 16, decoder: {width: 64}}\n")
    changes = ["method.name=classify", "method.num_classes=4", "train.epochs=2"]
    assert override(load_recipe(path), changes, "ckpt") == load_recipe(path, changes)


def test_errors_of_a_parsed_text_name_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^some\.ckpt: seed: must be a whole number, not 'x'$"):
        parse_recipe("seed: x", "some.ckpt")


@pytest.mark.parametrize("config", [Recipe(), ViTConfig(), MIMConfig(), ClassifyConfig(), DataConfig(), TrainConfig()])
def test_configs_are_frozen(config: object) -> None:
    name = dataclasses.fields(config)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


# --- errors -----------------------------------------------------------------------------------------------------

#: distillations, of equal maps and of encoder stages
KD = "encoder: vit_tiny\nmethod: {{name: manifold, {}}}\n"
SWIN_KD = "encoder: swin_tiny\nmethod: {{name: manifold, teacher_encoder: swin_small, fc_norm: false, {}}}\n"
#: text of the recipe, key that the error names, remedy or cause that it states
FILE_ERRORS = [
    ("encoder: {img_size: 64}", "encoder.img_size", f"did you mean image_size? valid: {ENCODER_KEYS}"),
    ("colour: red", "colour", f"valid: {RECIPE_KEYS}"),
    ("encoder: vit_bass", "encoder.name", f"did you mean vit_base? valid: {ENCODER_NAMES}"),
    ("method: {name: zzz}", "method.name", "valid: fastmim, simmim, mae, classify, manifold"),
    ("encoder: {name: [1]}", "encoder.name", f"valid: {ENCODER_NAMES}"),
    ("encoder: 5", "encoder", f"valid: {ENCODER_NAMES}"),
    ("data: 5", "data", f"valid keys: {DATA_KEYS}"),
    ("train: {epochs: 2.5}", "train.epochs", "must be a whole number, not 2.5"),
    ("train: {epochs: '3'}", "train.epochs", "must be a whole number, not '3'"),
    ("train: {epochs: true}", "train.epochs", "must be a whole number, not True"),
    ("train: {base_lr: fast}", "train.base_lr", "must be a number, not 'fast'"),
    ("train: {base_lr: true}", "train.base_lr", "must be a number, not True"),
    ("train: {base_lr: .nan}", "train.base_lr", "must be a number, not nan"),
    ("train: {base_lr: .inf}", "train.base_lr", "must be a number, not inf"),
    ("encoder: {qkv_bias: 1}", "encoder.qkv_bias", "must be true or false, not 1"),
    ("data: {root: 5}", "data.root", "put it in quotes"),
    ("train: {betas: 0.9}", "train.betas", "must be a list of 2 numbers, not 0.9"),
    ("train: {betas: [0.9]}", "train.betas", "must be a list of 2 numbers, not [0.9]"),
    ("train: {betas: [0.9, x]}", "train.betas", "must be a number, not 'x'"),
    ("data: {mean: 0.5}", "data.mean", "must be a list of numbers, not 0.5"),
    ("encoder: {image_size: [64, 64.5]}", "encoder.image_size", "must be a whole number, not 64.5"),
    ("train: {schedule: linear}", "train.schedule", "with rule: mae write cosine or step"),
    ("train: {rule: mmengine, schedule: step}", "train.schedule", "with rule: mmengine write cosine or multistep"),
    ("train: {warmup_prefix: true}", "train.warmup_prefix", "write false"),
    ("train: {per_epoch: true}", "train.per_epoch", "write false"),
    ("data: {repeats: 0}", "data.repeats", "0 is not above 0"),
    (KD.format("student_layers: [0, 12], teacher_layers: [0, 1]"), "method.student_layers", "write 0 to 11"),
    (KD.format("student_layers: [0], teacher_layers: [-1]"), "method.teacher_layers", "write 0 to 11"),
    (KD.format("student_layers: [0, 1], teacher_layers: [0]"), "method.teacher_layers", "write as many"),
    (
        KD.format("w_sample: 0"),
        "method.student_layers",
        "write for example student_layers: [0, 3] and teacher_layers: [0, 3], or beta: 0 to distil logits only",
    ),
    (KD.format("beta: 0, teacher_encoder: {image_size: 192}"), "method.teacher_encoder.image_size", "write [224, 224]"),
    (
        SWIN_KD.format("student_layers: [3], teacher_layers: [5]"),
        "method.teacher_layers",
        "write teacher blocks 2 to 3, or a max_patch_num that merges both to one map",
    ),
    (
        SWIN_KD.format("student_layers: [3], teacher_layers: [2], max_patch_num: 100"),
        "method.max_patch_num",
        "write 1, 4, 16, 49, 196, 784",
    ),
    (KD.format("beta: 0, alpha: 1.5"), "method.alpha", "1.5 is not a rate from 0 to 1"),
    (KD.format("beta: 0, tau: 0"), "method.tau", "0.0 is not above 0"),
    (KD.format("beta: 0, distillation: warm"), "method.distillation", "'warm' is not one of soft, hard, none"),
    (
        (
            KD.format("beta: 0, cache: answers, cutmix: 1.0")
            + "data: {crop_scale: [1, 1], crop_ratio: [1, 1], auto_augment: rand-m9}"
        ),
        "method.cache",
        "write data.auto_augment: '', data.hflip: 0, method.mixup: 0, method.cutmix: 0, or leave method.cache out",
    ),
    ("train: {cosine_epochs: 9}", "train.cosine_epochs", "write 0"),
    ("data: {erasing: 2}", "data.erasing", "2.0 is not a rate from 0 to 1"),
    ("method: {name: classify, mixup: -1}", "method.mixup", "-1.0 is negative"),
    ("encoder: {name: swin_base, image_size: 200}", "encoder.image_size", "write 192 or 224"),
    ("encoder: {name: swin_base, image_size: 198}\nmethod: classify", "encoder.image_size", "write 196 or 200"),
    ("encoder: {name: swin_tiny, depths: [2, 2]}", "encoder.num_heads", "write one per encoder stage"),
    (
        "encoder: {name: swin_base, image_size: 192}\nmethod: {name: simmim, mask_block: 2}",
        "method.mask_block",
        "legal: 4, 8, 16, 32, 64, 96",
    ),
    ("train: {schedule: zigzag}", "train.schedule", "'zigzag' is not one of cosine, step, multistep, linear"),
    ("device: TPU", "device", "'TPU' is not one of auto, CPU, GPU, Ascend"),
    ("train: [1, 2", "", "write `key: value` lines"),
    ("- a\n- b", "", "write `key: value` lines"),
    ("base: 5", "base", "must be a file name or a list of file names, not 5"),
    ("encoder: {image_size: 100}", "encoder.image_size", "write 96 or 112"),
    ("encoder: {image_size: [224, 8]}", "encoder.image_size", "write 16"),
    ("encoder: {num_heads: 5}", "encoder.num_heads", "5 does not divide embed_dim 768"),
    ("encoder: {embed_dim: 18, num_heads: 2}", "encoder.embed_dim", "write 16 or 20"),
    ("encoder: {drop_path: 1.0}", "encoder.drop_path", "1.0 is not a rate from 0 to 1"),
    ("encoder: {depth: 0}", "encoder.depth", "0 is not above 0"),
    ("method: {mask_ratio: 1.0}", "method.mask_ratio", "1.0 is not between 0 and 1"),
    ("method: {mask_block: 24}", "method.mask_block", "legal: 8, 16, 32, 112"),
    (
        "encoder: {image_size: [32, 64]}\nmethod: {mask_block: 64, target: pixels}",
        "method.mask_block",
        "legal: 1, 2, 4, 8, 16, 32",
    ),
    ("method: {mask_block: 32, target: {cell: 32}}", "method.target.cell", "legal: 2, 4, 8, 16"),
    ("method: {target: {cell: 5}}", "method.target.cell", "legal: 2, 4, 8, 16"),
    (
        "method: {target: {gaussian_window: 15}}",
        "method.target.gaussian_window",
        "15 does not divide the image side 224",
    ),
    ("method: {target: {gaussian_window: -1}}", "method.target.gaussian_window", "write 0 to turn it off"),
    (
        "method: {decoder: {depth: 0}}",
        "method.decoder.width",
        "must equal the encoder's width 768 when decoder.depth is 0",
    ),
    ("method: {decoder: {width: 100}}", "method.decoder.width", "write 96 or 128"),
    ("method: {decoder: {depth: -1}}", "method.decoder.depth", "write 0 for no blocks"),
    ("method: {name: classify, pool: cls}", "method.fc_norm", "write fc_norm: false"),
    ("train: {epochs: 5, warmup_epochs: 5}", "train.warmup_epochs", "write less than 5"),
    ("train: {betas: [0.9, 1.0]}", "train.betas", "1.0 is not in [0, 1)"),
    ("train: {layer_decay: 1.5}", "train.layer_decay", "1.5 is above 1, which means no decay"),
    ("train: {weight_decay: -0.1}", "train.weight_decay", "-0.1 is negative"),
    ("data: {mean: [0.5], std: [0.5]}", "data.mean", "write one per channel"),
    ("data: {std: [0.5]}", "data.std", "has 1 values, mean has 3"),
    ("data: {std: [0.5, 0, 1]}", "data.std", "[0.5, 0.0, 1.0] has a value that is not above 0"),
    ("data: {crop_scale: [0.5, 0.2]}", "data.crop_scale", "[0.5, 0.2] is not an increasing range above 0"),
    ("data: {crop_scale: [0.5, 1.2]}", "data.crop_scale", "1.2 is above 1, the whole image"),
    ("data: {eval_crop: 1.1}", "data.eval_crop", "1.1 is above 1, the whole image"),
    ("data: {labels_per_class: -1}", "data.labels_per_class", "write 0 for all"),
    ("data: {hflip: 1.5}", "data.hflip", "1.5 is not a rate from 0 to 1"),
    (
        "data: {auto_augment: v0}",
        "data.auto_augment",
        "'v0' in 'v0' is not valid; write for example rand-m9-mstd0.5-inc1",
    ),
    (
        "data: {auto_augment: rand-m11}",
        "data.auto_augment",
        "'m11' in 'rand-m11' is not valid; write for example rand-m9-mstd0.5-inc1",
    ),
    (
        "data: {auto_augment: rand-m9-inc0}",
        "data.auto_augment",
        "'inc0' in 'rand-m9-inc0' is not valid; write for example rand-m9-mstd0.5-inc1",
    ),
    (
        "data: {auto_augment: rand-m9-m8}",
        "data.auto_augment",
        "'m8' in 'rand-m9-m8' is not valid; write for example rand-m9-mstd0.5-inc1",
    ),
    (
        "data: {auto_augment: rand-m9.5}",
        "data.auto_augment",
        "'m9.5' in 'rand-m9.5' is not valid; write for example rand-m9-mstd0.5-inc1",
    ),
    (
        "data: {auto_augment: rand-}",
        "data.auto_augment",
        "'' in 'rand-' is not valid; write for example rand-m9-mstd0.5-inc1",
    ),
    ("data: {auto_augment: rand-m9, color_jitter: 0.4}", "data.color_jitter", "write 0"),
    ("data: {color_jitter: -0.1}", "data.color_jitter", "-0.1 is negative"),
    ("data: {erasing: 1.5}", "data.erasing", "1.5 is not a rate from 0 to 1"),
    ("data: {erasing_area: [0, 0.3]}", "data.erasing_area", "[0.0, 0.3] is not an increasing range above 0"),
    ("data: {erasing_area: [0.1, 1.1]}", "data.erasing_area", "1.1 is above 1, the whole image"),
    ("method: {name: classify, mixup: -1}", "method.mixup", "-1.0 is negative"),
    ("method: {name: classify, mixup_prob: 2}", "method.mixup_prob", "2.0 is not a rate from 0 to 1"),
    ("method: {name: classify, cutmix: 1}\ntrain: {batch_size: 7}", "train.batch_size", "write 6 or 8"),
    ("seed: -1", "seed", "-1 is negative"),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand", RandAugmentConfig()),
        ("rand-m9-mstd0.5-inc1", RandAugmentConfig(magnitude=9, std=0.5, increasing=True)),
        ("rand-inc1-n3-mstd1-m0", RandAugmentConfig(magnitude=0, operations=3, std=1.0, increasing=True)),
        ("rand-m10-mstd.25", RandAugmentConfig(std=0.25)),
    ],
)
def test_auto_augment_is_read_as_timm_reads_it(text: str, expected: RandAugmentConfig) -> None:
    assert parse_auto_augment(text) == expected


@pytest.mark.parametrize(
    ("text", "key", "remedy"), FILE_ERRORS, ids=[text.replace("\n", " ") for text, _, _ in FILE_ERRORS]
)
def test_an_error_in_a_file(write: Write, text: str, key: str, remedy: str) -> None:
    found = message(write("a.yaml", text + "\n"))
    assert found.startswith(f"FILE: {key}: " if key else "FILE: ")
    assert remedy in found


@pytest.mark.parametrize(
    ("override_text", "expected"),
    [
        ("train.epochs", "command line: 'train.epochs' is not key=value; write for example train.epochs=10"),
        ("=5", "command line: '=5' is not key=value; write for example train.epochs=10"),
        ("train..epochs=5", "command line: 'train..epochs=5' is not key=value; write for example train.epochs=10"),
        ("train.betas=[0.9", "command line: train.betas: '[0.9' is not a YAML value"),
        ("train.epochs=many", "command line: train.epochs: must be a whole number, not 'many'"),
        ("seeds=1", f"command line: seeds: unknown key of Recipe; did you mean seed? valid: {RECIPE_KEYS}"),
        ("base=x.yaml", f"command line: base: unknown key of Recipe; valid: {RECIPE_KEYS}"),
        ("encoder.name=[1]", f"command line: encoder.name: unknown preset [1]; valid: {ENCODER_NAMES}"),
        (
            "encoder.image_size=100",
            "command line: encoder.image_size: 100 is not a multiple of patch_size 16; write 96 or 112",
        ),
    ],
)
def test_an_error_in_an_override(write: Write, override_text: str, expected: str) -> None:
    assert message(write("a.yaml", "encoder: vit_base\nseed: 1\n"), override_text) == expected


def test_the_error_names_the_file_that_set_the_key(write: Write) -> None:
    base = write("base.yaml", "train: {epochs: x}\nseed: 1\n")
    child = write("child.yaml", "base: base.yaml\nseed: 2\n")
    assert message(child) == f"{base}: train.epochs: must be a whole number, not 'x'"


def test_a_missing_file(write: Write, tmp_path: Path) -> None:
    near = write("recipe.yaml", "")
    wanted = tmp_path / "recipes.yaml"
    assert message(wanted) == f"FILE: cannot read FILE (no such file); did you mean {near}?"
    assert message(tmp_path / "zz.yml") == "FILE: cannot read FILE (no such file); the folder has: recipe.yaml"
    (tmp_path / "empty").mkdir()
    assert (
        message(tmp_path / "empty" / "a.yaml") == "FILE: cannot read FILE (no such file); no .yaml file in that folder"
    )
    gone = tmp_path / "gone"
    assert message(gone / "a.yaml") == f"FILE: cannot read FILE (no such file); there is no folder {gone}"


def test_a_missing_base(write: Write, tmp_path: Path) -> None:
    path = write("child.yaml", "base: sub/bse.yaml\n")
    base = write("sub/base.yaml", "")
    wanted = tmp_path / "sub" / "bse.yaml"
    assert message(path) == f"FILE: base: cannot read {wanted} (no such file); did you mean {base}?"


def test_a_circle_of_bases(write: Write, tmp_path: Path) -> None:
    first, second = write("a.yaml", "base: b.yaml\n"), write("b.yaml", "base: a.yaml\n")
    assert message(first) == (
        f"{second}: base: files inherit from each other in a circle (FILE -> {second} -> FILE); remove one of them"
    )


# --- python -m src.config ---------------------------------------------------------------------------------------


def test_the_command_prints_the_resolved_recipe(write: Write, run_entry: Run) -> None:
    path = write("a.yaml", "encoder: vit_tiny\n")
    done = run_entry("-m", "src.config", path, "train.epochs=7")
    assert done.returncode == 0 and done.stderr == ""
    assert parse_recipe(done.stdout, "stdout") == load_recipe(path, ["train.epochs=7"])


def test_the_command_reports_an_error_in_one_line(write: Write, run_entry: Run) -> None:
    path = write("a.yaml", "train: {epoch: 7}\n")
    done = run_entry("-m", "src.config", path)
    assert_one_line_error(done, f"{path}: train.epoch: unknown key of TrainConfig; did you mean epochs?")
    assert done.stdout == ""
