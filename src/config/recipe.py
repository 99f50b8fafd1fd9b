"""The recipe of a run, and the checks between its parts."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .checks import FieldError, need, plural
from .encoders import ENCODERS, EncoderConfig, ViTConfig
from .methods import DECODERS, METHODS, TARGETS, MethodConfig, MIMConfig
from .paths import PathText
from .training import DataConfig, StageConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run."""

    encoder: EncoderConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MIMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: tuple[StageConfig, ...] = ()  # progressive resolution; train.epochs is the sum of their epochs
    seed: int = 0
    device: Literal["auto", "CPU", "GPU", "Ascend"] = "auto"
    output: PathText = ""  # output folder; empty: runs/<name of the recipe file>
    init_from: PathText = ""  # checkpoint whose encoder initialises this run

    def __post_init__(self) -> None:
        need(self.seed >= 0, "seed", f"{self.seed} is negative")
        need(self.seed < 2**32, "seed", f"{self.seed} is too large; write at most {2**32 - 1}")
        channels = self.encoder.in_chans
        place = shlex.quote(str(self.data.training_place))
        need(
            len(self.data.mean) == channels,
            "data.mean",
            f"has {plural(len(self.data.mean), 'value')} for encoder.in_chans {channels}; write one per channel, as in "
            f"data.std (python scripts/dataset_stats.py {place} --channels {channels} measures both)",
        )
        check_channels(self.data, channels)
        self.method.check(self)
        self._check_stages()

    def _check_stages(self) -> None:
        if not self.stages:
            return
        need(len(self.stages) <= 100, "stages", f"has {len(self.stages)} stages; write at most 100")
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

    def without_machine(self) -> Recipe:
        """Return the recipe without the settings for the machine of a training: kernels, threads, precision."""
        default = TrainConfig()
        train = replace(self.train, kernels=default.kernels, threads=default.threads, precision=default.precision)
        return replace(self, train=train)

    @property
    def trained_encoder(self) -> EncoderConfig:
        """The encoder that the run builds, cut to `method.encoder_blocks`."""
        return self.encoder.first_blocks(self.method.encoder_blocks)

    def encoder_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the encoder's weights that decide how large it is, by the names of checkpoints."""
        for name, shape in self.trained_encoder.weight_shapes():
            yield f"encoder.{name}", shape

    def stage_ends(self) -> list[int]:
        """Return the last epoch of each stage; a recipe without stages counts as one stage."""
        return list(itertools.accumulate(stage.epochs for stage in self.stages)) or [self.train.epochs]


def check_channels(data: DataConfig, channels: int) -> None:
    """Check that augmentation and pictures fit the number of channels."""
    for key, off in (("auto_augment", "''"), ("color_jitter", "0"), ("brightness", "0"), ("contrast", "0")):
        value = getattr(data, key)
        need(
            not value or channels in (1, 3),
            f"data.{key}",
            f"{value} changes colours, which needs encoder.in_chans 1 or 3, not {channels}; write {off}",
        )
    for band in data.show_bands:
        need(
            0 <= band < channels,
            "data.show_bands",
            f"{band} is not a channel of encoder.in_chans {channels}, which count from 0; write for example "
            f"{[0, 1, 2] if channels > 2 else [0]}",
        )


def at_stage(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe with the sizes and batches of one stage, and without `stages`."""
    if not recipe.stages:
        return recipe
    stage = recipe.stages[number]
    encoder = recipe.encoder.at_size(stage.image_size, stage.window_size)
    batches = {key: getattr(stage, key) or getattr(recipe.train, key) for key in ("batch_size", "accumulate")}
    return replace(recipe, encoder=encoder, train=replace(recipe.train, **batches), stages=())


#: field name -> preset name -> the dataclass with its defaults
PRESETS: dict[str, dict[str, Any]] = {
    "encoder": ENCODERS,
    "teacher_encoder": ENCODERS,
    "method": METHODS,
    "target": TARGETS,
    "decoder": DECODERS,
}
