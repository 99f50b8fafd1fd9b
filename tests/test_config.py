"""Recipes: inheritance, overrides, presets, typed values, and every error message word for word."""

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


# --- errors, word for word --------------------------------------------------------------------------------------

AUTO_AUGMENT_HELP = (
    "is not understood; write for example rand-m9-mstd0.5-inc1 (each part at most once): rand first, m0 to m10 "
    "magnitude, mstd0 to mstd100 its deviation, n1 or more operations, inc1 for operations that grow with the magnitude"
)
#: distillations, of equal maps and of stages
KD = "encoder: vit_tiny\nmethod: {{name: manifold, {}}}\n"
SWIN_KD = "encoder: swin_tiny\nmethod: {{name: manifold, teacher_encoder: swin_small, fc_norm: false, {}}}\n"
#: the recipe's text, the error with the file's path written as FILE
FILE_ERRORS = [
    (
        "encoder: {img_size: 64}",
        f"FILE: encoder.img_size: unknown key of ViTConfig; did you mean image_size? valid: {ENCODER_KEYS}",
    ),
    ("colour: red", f"FILE: colour: unknown key of Recipe; valid: {RECIPE_KEYS}"),
    (
        "encoder: vit_bass",
        f"FILE: encoder.name: unknown preset 'vit_bass'; did you mean vit_base? valid: {ENCODER_NAMES}",
    ),
    ("method: {name: zzz}", "FILE: method.name: unknown preset 'zzz'; valid: fastmim, simmim, mae, classify, manifold"),
    ("encoder: {name: [1]}", f"FILE: encoder.name: unknown preset [1]; valid: {ENCODER_NAMES}"),
    ("encoder: 5", f"FILE: encoder: must name a preset, not 5; valid: {ENCODER_NAMES}"),
    ("data: 5", f"FILE: data: must be a mapping of keys, not 5; valid keys: {DATA_KEYS}"),
    ("train: {epochs: 2.5}", "FILE: train.epochs: must be a whole number, not 2.5"),
    ("train: {epochs: '3'}", "FILE: train.epochs: must be a whole number, not '3'"),
    ("train: {epochs: true}", "FILE: train.epochs: must be a whole number, not True"),
    ("train: {base_lr: fast}", "FILE: train.base_lr: must be a number, not 'fast'"),
    ("train: {base_lr: true}", "FILE: train.base_lr: must be a number, not True"),
    ("train: {base_lr: .nan}", "FILE: train.base_lr: must be a number, not nan"),
    ("train: {base_lr: .inf}", "FILE: train.base_lr: must be a number, not inf"),
    ("encoder: {qkv_bias: 1}", "FILE: encoder.qkv_bias: must be true or false, not 1"),
    ("data: {root: 5}", "FILE: data.root: must be text, not 5; put it in quotes"),
    ("train: {betas: 0.9}", "FILE: train.betas: must be a list of 2 x a number, not 0.9"),
    ("train: {betas: [0.9]}", "FILE: train.betas: must be a list of 2 x a number, not [0.9]"),
    ("train: {betas: [0.9, x]}", "FILE: train.betas: must be a number, not 'x'"),
    ("data: {mean: 0.5}", "FILE: data.mean: must be a list of a number, not 0.5"),
    ("encoder: {image_size: [64, 64.5]}", "FILE: encoder.image_size: must be a whole number, not 64.5"),
    (
        "train: {schedule: linear}",
        "FILE: train.schedule: linear goes with rule: timm; rule: mae has cosine and step",
    ),
    (
        "train: {rule: mmengine, schedule: step}",
        "FILE: train.schedule: step goes with rule: timm; rule: mmengine has cosine and multistep",
    ),
    ("train: {warmup_prefix: true}", "FILE: train.warmup_prefix: goes with rule: timm; write false"),
    ("train: {per_epoch: true}", "FILE: train.per_epoch: goes with rule: timm; write false"),
    ("data: {repeats: 0}", "FILE: data.repeats: 0 is not above 0"),
    (
        KD.format("student_layers: [0, 12], teacher_layers: [0, 1]"),
        "FILE: method.student_layers: 12 is not a block of vit_tiny, which has 12; write 0 to 11",
    ),
    (
        KD.format("student_layers: [0], teacher_layers: [-1]"),
        "FILE: method.teacher_layers: -1 is not a block of vit, which has 12; write 0 to 11",
    ),
    (
        KD.format("student_layers: [0, 1], teacher_layers: [0]"),
        "FILE: method.teacher_layers: has 1 blocks, student_layers has 2; write one for each of them",
    ),
    (
        KD.format("w_sample: 0"),
        "FILE: method.student_layers: names no block; write for example student_layers: [0, 3] and teacher_layers: "
        "[0, 3], or beta: 0 for logits alone",
    ),
    (
        KD.format("beta: 0, teacher_encoder: {image_size: 192}"),
        "FILE: method.teacher_encoder.image_size: 192x192, but the student has 224x224 and both see the same images; "
        "write [224, 224]",
    ),
    (
        SWIN_KD.format("student_layers: [3], teacher_layers: [5]"),
        "FILE: method.teacher_layers: student block 3 has 28x28 tokens, teacher block 5 14x14; write teacher blocks 2 "
        "to 3, or a max_patch_num that merges both to one map",
    ),
    (
        SWIN_KD.format("student_layers: [3], teacher_layers: [2], max_patch_num: 100"),
        "FILE: method.max_patch_num: 100 asks for 10x10 tokens, which do not tile the 28x28 of student block 3; write "
        "1, 4, 16, 49, 196, 784",
    ),
    (KD.format("beta: 0, alpha: 1.5"), "FILE: method.alpha: 1.5 is not a rate from 0 to 1"),
    (KD.format("beta: 0, tau: 0"), "FILE: method.tau: 0.0 is not above 0"),
    (KD.format("beta: 0, distillation: warm"), "FILE: method.distillation: 'warm' is not one of soft, hard, none"),
    (
        KD.format("beta: 0, cache: answers, cutmix: 1.0")
        + "data: {crop_scale: [1, 1], crop_ratio: [1, 1], auto_augment: rand-m9}",
        "FILE: method.cache: keeps the teacher's answers to images that never change; write data.auto_augment: '', "
        "data.hflip: 0, method.mixup: 0, method.cutmix: 0, or leave method.cache out",
    ),
    ("train: {cosine_epochs: 9}", "FILE: train.cosine_epochs: goes with rule: mmengine; write 0"),
    ("data: {erasing: 2}", "FILE: data.erasing: 2.0 is not a rate from 0 to 1"),
    ("method: {name: classify, mixup: -1}", "FILE: method.mixup: -1.0 is negative"),
    (
        "encoder: {name: swin_base, image_size: 200}",
        "FILE: encoder.image_size: 200 is not a multiple of 32 (the side of an output token), which masks and targets "
        "need; write 192 or 224",
    ),
    (
        "encoder: {name: swin_base, image_size: 198}\nmethod: classify",
        "FILE: encoder.image_size: 198 is not a multiple of patch_size 4; write 196 or 200",
    ),
    ("encoder: {name: swin_tiny, depths: [2, 2]}", "FILE: encoder.num_heads: has 4 stages, depths has 2"),
    (
        "encoder: {name: swin_base, image_size: 192}\nmethod: {name: simmim, mask_block: 2}",
        "FILE: method.mask_block: 2 does not fit image 192x192 and tokens of 32 pixels and patches of 4, whose tokens "
        "are masked; legal: 4, 8, 16, 32, 64, 96",
    ),
    ("train: {schedule: zigzag}", "FILE: train.schedule: 'zigzag' is not one of cosine, step, multistep, linear"),
    ("device: TPU", "FILE: device: 'TPU' is not one of auto, CPU, GPU, Ascend"),
    (
        "train: [1, 2",
        "FILE: line 2 is not YAML (expected ',' or ']', but got '<stream end>'); write `key: value` lines",
    ),
    ("- a\n- b", "FILE: must be a mapping of keys, not list; write `key: value` lines"),
    ("base: 5", "FILE: base: must be a file name or a list of file names, not 5"),
    ("encoder: {image_size: 100}", "FILE: encoder.image_size: 100 is not a multiple of patch_size 16; write 96 or 112"),
    ("encoder: {image_size: [224, 8]}", "FILE: encoder.image_size: 8 is not a multiple of patch_size 16; write 16"),
    ("encoder: {num_heads: 5}", "FILE: encoder.num_heads: 5 does not divide embed_dim 768"),
    (
        "encoder: {embed_dim: 18, num_heads: 2}",
        "FILE: encoder.embed_dim: 18 is not a multiple of 4, which position: sincos needs; write 16 or 20",
    ),
    ("encoder: {drop_path: 1.0}", "FILE: encoder.drop_path: 1.0 is not a rate from 0 to 1"),
    ("encoder: {depth: 0}", "FILE: encoder.depth: 0 is not above 0"),
    ("method: {mask_ratio: 1.0}", "FILE: method.mask_ratio: 1.0 is not between 0 and 1"),
    (
        "method: {mask_block: 24}",
        "FILE: method.mask_block: 24 does not fit image 224x224 and tokens of 16 pixels and HOG cells of 8; "
        "legal: 8, 16, 32, 112",
    ),
    (
        "encoder: {image_size: [32, 64]}\nmethod: {mask_block: 64, target: pixels}",
        "FILE: method.mask_block: 64 does not fit image 32x64 and tokens of 16 pixels; legal: 1, 2, 4, 8, 16, 32",
    ),
    (
        "method: {mask_block: 32, target: {cell: 32}}",
        "FILE: method.target.cell: 32 does not divide the token side 16; legal: 2, 4, 8, 16",
    ),
    (
        "method: {target: {cell: 5}}",  # the cell is at fault, not the block
        "FILE: method.target.cell: 5 does not divide the token side 16; legal: 2, 4, 8, 16",
    ),
    (
        "method: {target: {gaussian_window: 15}}",
        "FILE: method.target.gaussian_window: 15 does not divide the image side 224",
    ),
    ("method: {target: {gaussian_window: -1}}", "FILE: method.target.gaussian_window: -1 is negative; 0 turns it off"),
    (
        "method: {decoder: {depth: 0}}",
        "FILE: method.decoder.width: must equal the encoder's width 768 when decoder.depth is 0",
    ),
    (
        "method: {decoder: {width: 100}}",
        "FILE: method.decoder.width: 100 is not shared out evenly by heads of at least 32; write 96 or 128",
    ),
    ("method: {decoder: {depth: -1}}", "FILE: method.decoder.depth: -1 is negative; 0 leaves the blocks out"),
    (
        "method: {name: classify, pool: cls}",
        "FILE: method.fc_norm: goes with pool: mean; the class token is taken after the encoder's own norm, "
        "write fc_norm: false",
    ),
    (
        "train: {epochs: 5, warmup_epochs: 5}",
        "FILE: train.warmup_epochs: 5 leaves nothing of 5 epochs; write less than 5",
    ),
    ("train: {betas: [0.9, 1.0]}", "FILE: train.betas: 1.0 is not in [0, 1)"),
    ("train: {layer_decay: 1.5}", "FILE: train.layer_decay: 1.5 is above 1, which means no decay"),
    ("train: {weight_decay: -0.1}", "FILE: train.weight_decay: -0.1 is negative"),
    ("data: {mean: [0.5], std: [0.5]}", "FILE: data.mean: has 1 values for encoder.in_chans 3; write one per channel"),
    ("data: {std: [0.5]}", "FILE: data.std: has 1 values, mean has 3"),
    ("data: {std: [0.5, 0, 1]}", "FILE: data.std: [0.5, 0.0, 1.0] has a value that is not above 0"),
    ("data: {crop_scale: [0.5, 0.2]}", "FILE: data.crop_scale: [0.5, 0.2] is not an increasing range above 0"),
    ("data: {crop_scale: [0.5, 1.2]}", "FILE: data.crop_scale: 1.2 is above 1, the whole image"),
    ("data: {eval_crop: 1.1}", "FILE: data.eval_crop: 1.1 is above 1, the whole image"),
    ("data: {labels_per_class: -1}", "FILE: data.labels_per_class: is negative; 0 takes all"),
    ("data: {hflip: 1.5}", "FILE: data.hflip: 1.5 is not a rate from 0 to 1"),
    ("data: {auto_augment: v0}", f"FILE: data.auto_augment: 'v0' in 'v0' {AUTO_AUGMENT_HELP}"),
    ("data: {auto_augment: rand-m11}", f"FILE: data.auto_augment: 'm11' in 'rand-m11' {AUTO_AUGMENT_HELP}"),
    ("data: {auto_augment: rand-m9-inc0}", f"FILE: data.auto_augment: 'inc0' in 'rand-m9-inc0' {AUTO_AUGMENT_HELP}"),
    ("data: {auto_augment: rand-m9-m8}", f"FILE: data.auto_augment: 'm8' in 'rand-m9-m8' {AUTO_AUGMENT_HELP}"),
    ("data: {auto_augment: rand-m9.5}", f"FILE: data.auto_augment: 'm9.5' in 'rand-m9.5' {AUTO_AUGMENT_HELP}"),
    ("data: {auto_augment: rand-}", f"FILE: data.auto_augment: '' in 'rand-' {AUTO_AUGMENT_HELP}"),
    (
        "data: {auto_augment: rand-m9, color_jitter: 0.4}",
        "FILE: data.color_jitter: 0.4 would be ignored by timm beside auto_augment; write 0, which is the same there",
    ),
    ("data: {color_jitter: -0.1}", "FILE: data.color_jitter: -0.1 is negative"),
    ("data: {erasing: 1.5}", "FILE: data.erasing: 1.5 is not a rate from 0 to 1"),
    ("data: {erasing_area: [0, 0.3]}", "FILE: data.erasing_area: [0.0, 0.3] is not an increasing range above 0"),
    ("data: {erasing_area: [0.1, 1.1]}", "FILE: data.erasing_area: 1.1 is above 1, the whole image"),
    ("method: {name: classify, mixup: -1}", "FILE: method.mixup: -1.0 is negative"),
    ("method: {name: classify, mixup_prob: 2}", "FILE: method.mixup_prob: 2.0 is not a rate from 0 to 1"),
    (
        "method: {name: classify, cutmix: 1}\ntrain: {batch_size: 7}",
        "FILE: train.batch_size: 7 is odd, and method.mixup and cutmix pair the images; write 6 or 8",
    ),
    ("seed: -1", "FILE: seed: -1 is negative"),
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


@pytest.mark.parametrize(("text", "expected"), FILE_ERRORS, ids=[text.replace("\n", " ") for text, _ in FILE_ERRORS])
def test_an_error_in_a_file(write: Write, text: str, expected: str) -> None:
    assert message(write("a.yaml", text + "\n")) == expected


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
    assert message(tmp_path / "zz.yml") == "FILE: cannot read FILE (no such file); there is: recipe.yaml"
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
