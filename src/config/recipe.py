"""A recipe: everything that decides what a run does, and the checks that join its parts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .checks import FieldError, legal_near, need, show_size
from .encoders import ENCODERS, EncoderConfig, SwinConfig, ViTConfig, first_blocks
from .methods import (
    DECODERS,
    METHODS,
    TARGETS,
    ClassifyConfig,
    ManifoldConfig,
    MethodConfig,
    MIMConfig,
    check_mim,
    relation_maps,
)
from .training import DataConfig, StageConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run does."""

    encoder: EncoderConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MIMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: tuple[StageConfig, ...] = ()  # progressive resolution; train.epochs is their sum
    seed: int = 0
    device: Literal["auto", "CPU", "GPU", "Ascend"] = "auto"
    output: str = ""  # folder of the run; empty: runs/<name of the recipe file>
    init_from: str = ""  # checkpoint whose encoder the run starts from

    def __post_init__(self) -> None:
        need(self.seed >= 0, "seed", f"{self.seed} is negative")
        channels = self.encoder.in_chans
        need(
            len(self.data.mean) == channels,
            "data.mean",
            f"has {len(self.data.mean)} values for encoder.in_chans {channels}; write one per channel",
        )
        if isinstance(self.method, MIMConfig):
            check_mim(self.trained_encoder, self.method)
        if isinstance(self.method, ManifoldConfig):
            check_manifold(self)
        if isinstance(self.method, ClassifyConfig) and self.method.mixes:
            batch = self.train.batch_size
            need(
                batch % 2 == 0,
                "train.batch_size",
                f"{batch} is odd, and method.mixup and cutmix pair the images; write {legal_near(batch, 2)}",
            )
        self._check_stages()

    def _check_stages(self) -> None:
        if not self.stages:
            return
        total = sum(stage.epochs for stage in self.stages)
        need(
            total == self.train.epochs,
            "train.epochs",
            f"{self.train.epochs}, but the stages have {total}; write {total}",
        )
        for number in range(len(self.stages)):
            try:
                at_stage(self, number)
            except FieldError as error:
                raise FieldError(f"stages.{number}", f"{error.key.removeprefix('encoder.')}: {error}") from None

    @property
    def trained_encoder(self) -> EncoderConfig:
        """The encoder that the run builds: without the blocks that pre-training leaves out."""
        blocks = self.method.encoder_blocks if isinstance(self.method, MIMConfig) else 0
        return first_blocks(self.encoder, blocks) if blocks else self.encoder

    def stage_ends(self) -> list[int]:
        """The epoch each stage ends with; one stage if there are none."""
        return list(itertools.accumulate(stage.epochs for stage in self.stages)) or [self.train.epochs]


def at_stage(recipe: Recipe, number: int) -> Recipe:
    """A recipe as it is during a stage: sizes and batches of the stage, and no stages."""
    if not recipe.stages:
        return recipe
    stage = recipe.stages[number]
    sizes: dict[str, Any] = {"image_size": stage.image_size}
    if stage.window_size:
        need(
            isinstance(recipe.encoder, SwinConfig),
            "window_size",
            f"{recipe.encoder.name} has no windows; leave window_size out",
        )
        sizes["window_size"] = stage.window_size
    batches = {key: getattr(stage, key) or getattr(recipe.train, key) for key in ("batch_size", "accumulate")}
    return replace(recipe, encoder=replace(recipe.encoder, **sizes), train=replace(recipe.train, **batches), stages=())


def check_manifold(recipe: Recipe) -> None:
    """Teacher and student see the same images, and the blocks of a pair have the same map."""
    method = recipe.method
    assert isinstance(method, ManifoldConfig)
    student, teacher = recipe.encoder, method.teacher_encoder
    need(
        bool(method.student_layers) or not method.relates,
        "method.student_layers",
        "names no block; write for example student_layers: [0, 3] and teacher_layers: [0, 3], or beta: 0 for logits "
        "alone",
    )
    for key in ("image_size", "in_chans"):
        ours, theirs = getattr(student, key), getattr(teacher, key)
        need(
            ours == theirs,
            f"method.teacher_encoder.{key}",
            f"{show_size(theirs)}, but the student has {show_size(ours)} and both see the same images; "
            f"write {list(ours) if isinstance(ours, tuple) else ours}",
        )
    for key, encoder in (("student_layers", student), ("teacher_layers", teacher)):
        blocks = len(encoder.block_maps)
        for number in getattr(method, key):
            need(
                0 <= number < blocks,
                f"method.{key}",
                f"{number} is not a block of {encoder.name}, which has {blocks}; write 0 to {blocks - 1}",
            )
    relation_maps(recipe.encoder, method)
    if method.cache:
        check_cache(recipe)


def check_cache(recipe: Recipe) -> None:
    """Kept answers need images that are the same in every epoch."""
    still: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "auto_augment": ""}
    still |= dict.fromkeys(("hflip", "brightness", "contrast", "color_jitter", "erasing"), 0.0)
    moving = [f"data.{key}: {show_value(rest)}" for key, rest in still.items() if getattr(recipe.data, key) != rest]
    if recipe.stages:
        moving.append("no stages")
    if recipe.method.mixes:  # type: ignore[union-attr]
        moving += ["method.mixup: 0", "method.cutmix: 0"]
    need(
        not moving,
        "method.cache",
        "keeps the teacher's answers to images that never change; write "
        + ", ".join(moving)
        + ", or leave method.cache out",
    )


def show_value(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else "''"


#: field name -> preset name -> the dataclass with its defaults
PRESETS = {
    "encoder": ENCODERS,
    "teacher_encoder": ENCODERS,
    "method": METHODS,
    "target": TARGETS,
    "decoder": DECODERS,
}
