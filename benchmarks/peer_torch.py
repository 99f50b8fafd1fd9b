"""The PyTorch and transformers side of the benchmark: one line on stdout per line on stdin (see serve.py).

    python benchmarks/peer_torch.py --case fastmim_vit_base [--batch 32] [--precision bfloat16] [--compile]

It needs Linux and an environment with torch and transformers; benchmarks/step.py runs it. It uses all cores that the
process may use. `--products LIST` times matrix products instead of a case.

The training cases use AdamW; bfloat16 is autocast, with float32 weights. FastMIM: a ViT or Swin with a learned RGB mask
token on 75 % of the blocks, a small transformer decoder, HOG targets computed in the step, mean squared error on the
masked blocks. SimMIM: 60 % of the 32-pixel blocks masked, pixels, absolute error, gradients clipped; Swin is the
library's SwinForMaskedImageModeling, ViT its BeitModel with one shared position table. The inference cases are
classifiers at 224 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from serve import Times, resident, serve, timed
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BeitConfig,
    BeitModel,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.modeling_vit import ViTLayer

DECODER_WIDTH = 256
DECODER_HEADS = 8
BINS = 9
CELL = 8
SWIN_BASE = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "drop_path_rate": 0.0}


class HogTarget(nn.Module):
    """Histograms of oriented gradients of each colour channel, as one vector per token."""

    sobel: Tensor

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        both = torch.stack([across, across.T])[:, None]
        self.register_buffer("sobel", both.repeat(3, 1, 1, 1), persistent=False)  # x and y of each channel

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        padded = functional.pad(images, (1, 1, 1, 1), mode="reflect")
        gradients = functional.conv2d(padded, self.sobel, groups=channels)
        gx, gy = gradients.view(batch, channels, 2, height, width).unbind(2)
        norm = torch.hypot(gx, gy)
        bins = (torch.atan2(gx, gy) * (BINS / math.pi)).floor_().long().remainder_(BINS)
        votes = images.new_zeros(batch, channels, BINS, height, width)
        votes.scatter_(2, bins.unsqueeze(2), norm.unsqueeze(2))  # one bin for each pixel
        cells = votes.view(batch, channels, BINS, height // CELL, CELL, width // CELL, CELL).sum((4, 6))
        cells = functional.normalize(cells, dim=2)
        side, stride = self.stride // CELL, self.stride
        patches = cells.view(batch, channels * BINS, height // stride, side, width // stride, side)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class FastMim(nn.Module):
    """A Hugging Face encoder with mask token, decoder and loss of FastMIM; a mask block is one token."""

    def __init__(self, encoder: nn.Module, width: int, stride: int, decoder_depth: int, eps: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.stride = stride
        self.mask_token = nn.Parameter(torch.empty(1, 3, 1, 1).normal_(std=0.02))
        decoder = vit_config(DECODER_WIDTH, 1, DECODER_HEADS, stride, eps)
        self.decoder = nn.Sequential(
            nn.Linear(width, DECODER_WIDTH),
            *(ViTLayer(decoder) for _ in range(decoder_depth)),
            nn.LayerNorm(DECODER_WIDTH, eps=eps),
            nn.Linear(DECODER_WIDTH, 3 * BINS * (stride // CELL) ** 2),
        )
        self.hog = HogTarget(stride)

    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[2] // self.stride
        masked = draw_mask(images.shape[0], grid * grid, int(grid * grid * 0.75))
        blocks = enlarge(masked.view(-1, 1, grid, grid), self.stride)
        hidden = self.encoder(torch.where(blocks, self.mask_token, images)).last_hidden_state
        predicted = self.decoder(hidden)[:, -grid * grid :]  # without class token
        return functional.mse_loss(predicted[masked], self.hog(images)[masked])


class SimMimSwin(nn.Module):
    """Hugging Face's SimMIM with masks drawn in the step: 22 of 36 blocks at 192 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SwinForMaskedImageModeling(swin_config(192, 6))

    def forward(self, images: Tensor) -> Tensor:
        masked = draw_mask(images.shape[0], 36, math.ceil(36 * 0.6))
        patches = enlarge(masked.view(-1, 1, 6, 6), 8)  # 32 pixels are 8 patches
        return self.network(images, bool_masked_pos=patches.flatten(1)).loss


class SimMimViT(nn.Module):
    """SimMIM's ViT-B at 224 pixels: 30 of 49 blocks masked, one linear layer predicts the pixels of each patch."""

    def __init__(self) -> None:
        super().__init__()
        config = BeitConfig(
            image_size=224,
            layer_norm_eps=1e-6,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,  # with the final norm
            attn_implementation="sdpa",
        )
        self.encoder = BeitModel(config, add_pooling_layer=False)
        self.decoder = nn.Linear(768, 3 * 16**2)

    def forward(self, images: Tensor) -> Tensor:
        masked = draw_mask(images.shape[0], 49, math.ceil(49 * 0.6))
        patches = enlarge(masked.view(-1, 1, 7, 7), 2).flatten(1)  # 32 pixels are 2 patches
        predicted = self.decoder(self.encoder(images, bool_masked_pos=patches).last_hidden_state[:, 1:])
        target = functional.unfold(images, 16, stride=16).transpose(1, 2)
        error = functional.l1_loss(predicted, target, reduction="none").sum(2)
        return (error * patches).sum() / (patches.sum() * target.shape[2] + 1e-5)


class ViTClassifier(nn.Module):
    """ViT-B/16 that normalises the mean of the patch tokens (transformers' classifier takes the class token)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ViTModel(vit_config(768, 12, 12, 224, 1e-6), add_pooling_layer=False)
        self.norm, self.encoder.layernorm = self.encoder.layernorm, nn.Identity()
        self.head = nn.Linear(768, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(images).last_hidden_state[:, 1:].mean(1)))


def enlarge(masked: Tensor, times: int) -> Tensor:
    return masked.repeat_interleave(times, 2).repeat_interleave(times, 3)


def vit_config(width: int, layers: int, heads: int, image_size: int, eps: float) -> ViTConfig:
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=eps,
        image_size=image_size,
        patch_size=16,
        attn_implementation="sdpa",
    )


def swin_config(image_size: int, window: int, **further: int) -> SwinConfig:
    sizes = {**SWIN_BASE, **further}
    return SwinConfig(image_size=image_size, window_size=window, encoder_stride=32, layer_norm_eps=1e-5, **sizes)


def draw_mask(batch: int, blocks: int, count: int) -> Tensor:
    """Mask `count` random blocks of each sample."""
    return torch.rand(batch, blocks).argsort(1).argsort(1) < count


@dataclass
class Training:
    """How a case is trained."""

    model: nn.Module
    image_size: int
    beta: float
    clip: float


def fastmim_vit_base() -> Training:
    encoder = ViTModel(vit_config(768, 12, 12, 128, 1e-6), add_pooling_layer=False)
    encoder.embeddings.position_embeddings.requires_grad_(False)  # fixed in FastMIM
    return Training(FastMim(encoder, 768, 16, 1, 1e-6), 128, 0.95, 0.0)


def fastmim_swin_base() -> Training:
    encoder = SwinModel(swin_config(128, 4), add_pooling_layer=False)
    return Training(FastMim(encoder, 1024, 32, 4, 1e-5), 128, 0.95, 0.0)


TRAINING: dict[str, Callable[[], Training]] = {
    "fastmim_vit_base": fastmim_vit_base,
    "fastmim_swin_base": fastmim_swin_base,
    "simmim_swin_base": lambda: Training(SimMimSwin(), 192, 0.999, 5.0),
    "simmim_vit_base": lambda: Training(SimMimViT(), 224, 0.999, 5.0),
}
INFERENCE: dict[str, Callable[[], nn.Module]] = {
    "infer_vit_base": ViTClassifier,
    "infer_swin_base": lambda: SwinForImageClassification(swin_config(224, 7, num_labels=1000)),
}


def train(case: Training, args: argparse.Namespace) -> tuple[Callable[[], Times], int]:
    """Return a function that runs one training step, and the number of trained parameters."""
    trained = [parameter for parameter in case.model.train().parameters() if parameter.requires_grad]
    # measured: for these parameters fused is faster than foreach and than the plain loop
    optimizer = torch.optim.AdamW(trained, lr=1.5e-4, betas=(0.9, case.beta), weight_decay=0.05, fused=True)
    forward = torch.compile(case.model) if args.compile else case.model

    def update(images: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            loss = forward(images)
        loss.backward()
        if case.clip:
            nn.utils.clip_grad_norm_(trained, case.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def step() -> Times:
        images = torch.randn(args.batch, 3, case.image_size, case.image_size)
        return timed(lambda: update(images))

    return step, sum(parameter.numel() for parameter in trained)


def classify(model: nn.Module, args: argparse.Namespace) -> tuple[Callable[[], Times], int]:
    """Return a function that classifies one batch, and the number of parameters."""
    forward = torch.compile(model.eval()) if args.compile else model.eval()

    @torch.inference_mode()
    def step() -> Times:
        images = torch.randn(args.batch, 3, 224, 224)
        return timed(lambda: getattr(output := forward(images), "logits", output).sum().item())

    return step, sum(parameter.numel() for parameter in model.parameters())


def multiply(entries: list[list[int]], dtype: torch.dtype) -> Callable[[], Times]:
    """Return a function that computes the products of benchmarks/cases.py in preallocated memory.

    The second factor is stored transposed, as a linear layer stores its weight.
    """
    calls = []
    for count, batch, m, k, n, passes in entries:
        a, b, c = (torch.randn(batch, *sizes, dtype=dtype) for sizes in ((m, k), (n, k), (m, n)))
        calls += [(c, a, b.mT), (torch.empty_like(b), c.mT, a), (torch.empty_like(a), c, b)][:passes] * count

    def run() -> float:
        for out, left, right in calls:
            if len(out) == 1:
                torch.mm(left[0], right[0], out=out[0])
            else:
                torch.bmm(left, right, out=out)
        return 0.0

    return lambda: timed(run)


def main() -> int:
    imported = resident()
    parser = argparse.ArgumentParser(description="the PyTorch side of the benchmark")
    parser.add_argument("--case", choices=sorted([*TRAINING, *INFERENCE]))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--products", type=json.loads, metavar="LIST", help="products of benchmarks/cases.py, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if args.products:
        serve(multiply(args.products, getattr(torch, args.precision)), 0, imported)
    elif args.case in INFERENCE:
        serve(*classify(INFERENCE[args.case](), args), imported)
    else:
        serve(*train(TRAINING[args.case](), args), imported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
