"""Masked image modelling: one Method for every combination of encoder, mask, target and decoder."""

from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from ..config import HOGConfig, LinearDecoderConfig, MIMConfig, PixelsConfig
from ..models.encoder import Encoder
from ..models.layers import parameter
from .decoders import LinearDecoder, TransformerDecoder
from .masking import BlockMask, resize_mask
from .targets import HOG, Pixels


class MaskedImageModel(nn.Cell):
    """Hide blocks of the image, encode, predict the target of the hidden tokens.

    FastMIM (mim_vit_pretrain.py): a learned colour replaces the masked pixels before the patch embedding, a
    transformer decoder predicts HOG or pixels, mean squared error over masked tokens. SimMIM (models/simmim.py): a
    learned vector replaces the masked tokens after the patch embedding, one linear layer predicts pixels, mean
    absolute error over masked pixels.

    Args:
        encoder: any encoder with its final norm.
        config: mask, target and decoder.
        image_size: height and width of the training images.
    """

    columns = ("image",)
    parts = ("baseline",)
    metrics = ("loss", "baseline")
    best = ("loss", "min")

    def __init__(self, encoder: Encoder, config: MIMConfig, image_size: tuple[int, int]):
        super().__init__()
        self.on_tokens = config.corrupt == "token"
        shape = (1, 1, encoder.embed_dim) if self.on_tokens else (1, encoder.in_chans, 1, 1)
        self.mask_token = parameter(Normal(0.02), *shape)
        self.encoder = encoder
        self.num_layers = encoder.num_layers
        self.target = {HOGConfig: HOG, PixelsConfig: Pixels}[type(config.target)](
            config.target, encoder.stride, encoder.in_chans
        )
        prefix = encoder.num_prefix_tokens
        if isinstance(config.decoder, LinearDecoderConfig):
            self.decoder: nn.Cell = LinearDecoder(encoder.out_dim, self.target.dim, prefix)
        else:
            self.decoder = TransformerDecoder(
                config.decoder, encoder.out_dim, self.target.dim, prefix, encoder.norm_eps
            )
        self.absolute = config.loss == "l1"
        self.grid = encoder.grid(image_size)
        self.image_size = image_size
        block = config.mask_block
        self.mask = BlockMask((image_size[0] // block, image_size[1] // block), config.mask_ratio, self.on_tokens)

    def construct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> loss of a random mask, and the loss of predicting the mean target."""
        loss, baseline, _, _ = self.run(image, self.mask(image.shape[0]))
        return loss, baseline

    def run(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With a given block mask (B, rows, cols): loss, baseline, prediction (B, N, dim), target (B, N, dim)."""
        prediction = self.decoder(self.encode(image, mask))
        target = ops.stop_gradient(self.target(image))
        weights = self.target.weights(mask, self.grid)
        if self.absolute:
            loss = masked_mean_absolute(prediction - target, weights)
            baseline = masked_mean_absolute(target - mean_target(target, weights), weights)
        else:
            loss = masked_mean_square(prediction - target, weights)
            baseline = mean_target_loss(target, weights)
        return loss, ops.stop_gradient(baseline), prediction, target

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """Encoder output of an image with the mask's blocks hidden."""
        if not self.on_tokens:
            return self.encoder(self.hide(image, mask))
        tokens = self.encoder.embed(image)
        batch, count, dim = tokens.shape
        grid = (self.image_size[0] // self.encoder.patch_size, self.image_size[1] // self.encoder.patch_size)
        hidden = ops.tile(resize_mask(mask, grid).reshape(batch, count, 1), (1, 1, dim))
        token = ops.tile(self.mask_token, (batch, count, 1))
        return self.encoder.encode(tokens * (1.0 - hidden) + token * hidden)

    def hide(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with the mask token's colour on masked blocks."""
        batch, chans, height, width = image.shape
        pixels = ops.tile(resize_mask(mask, self.image_size).expand_dims(1), (1, chans, 1, 1))
        colour = ops.tile(self.mask_token, (batch, 1, height, width))
        return image * (1.0 - pixels) + colour * pixels

    def measure(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the images that count (label >= 0), with the same mask every time: count, loss, baseline."""
        counted = (label >= 0).astype(mindspore.float32)
        mask = self.fixed_mask(image.shape[0]) * counted.reshape(-1, 1, 1)
        loss, baseline, _, _ = self.run(image, mask)
        count = counted.sum()
        return count, loss * count, baseline * count

    def fixed_mask(self, batch: int) -> Tensor:
        """The masks (B, rows, cols) of evaluations and pictures: the same in every run and epoch."""
        blocks = self.mask.grid[0] * self.mask.grid[1]
        return self.mask.from_noise(Tensor(np.random.default_rng(0).random((batch, blocks), np.float32)))

    def layer_of(self, name: str) -> int:
        """Learning-rate layer: the encoder's own, everything else on top."""
        if name.startswith("encoder."):
            return self.encoder.layer_of(name.removeprefix("encoder."))
        return self.encoder.num_layers - 1

    def no_weight_decay(self) -> set[str]:
        """Names left without weight decay unless the recipe lists them in `train.decayed`."""
        return {"mask_token"} | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def masked_mean_square(error: Tensor, weights: Tensor) -> Tensor:
    """Mean of squares over the values of weight 1: error (B, N, C), weights (B, N) or (B, N, C)."""
    square = error * error
    if weights.ndim == 2:
        return (square.sum(axis=-1) * weights).sum() / (weights.sum() * error.shape[-1])
    return (square * weights).sum(axis=-1).sum() / weights.sum(axis=-1).sum()


def masked_mean_absolute(error: Tensor, weights: Tensor) -> Tensor:
    """Mean of absolute values over the values of weight 1: error (B, N, C), weights (B, N) or (B, N, C).

    SimMIM models/simmim.py adds 1e-5 to the number of masked pixels of one channel, which moves nothing that float32
    shows as soon as one pixel is masked.
    """
    size = ops.abs(error)
    if weights.ndim == 2:
        return (size.sum(axis=-1) * weights).sum() / (weights.sum() * error.shape[-1] + 1e-5)
    return (size * weights).sum(axis=-1).sum() / (weights.sum(axis=-1).sum() + 1e-5)


def mean_target(target: Tensor, weights: Tensor) -> Tensor:
    """The mean of the values of weight 1, channel by channel, at every token: (B, N, C)."""
    batch, tokens, dim = target.shape
    each = weights if weights.ndim == 3 else ops.tile(weights.expand_dims(-1), (1, 1, dim))
    mean = (target * each).sum(axis=(0, 1)) / ops.maximum(each.sum(axis=(0, 1)), 1.0)
    return ops.tile(mean.reshape(1, 1, dim), (batch, tokens, 1))


def mean_target_loss(target: Tensor, weights: Tensor) -> Tensor:
    """`masked_mean_square` of a predictor that always says the mean target, channel by channel: the variance."""
    rows = target.reshape(-1, target.shape[-1])
    if weights.ndim == 2:
        line = weights.reshape(1, -1)
        count = weights.sum()
        first, second = ops.matmul(line, rows), ops.matmul(line, rows * rows)
        return (second - first * first / count).sum() / (count * target.shape[-1])
    each = weights.reshape(rows.shape)
    counts = each.sum(axis=0)
    first, second = (rows * each).sum(axis=0), (rows * rows * each).sum(axis=0)
    return (second - first * first / ops.maximum(counts, 1.0)).sum() / counts.sum()
