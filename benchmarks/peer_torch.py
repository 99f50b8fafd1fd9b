"""The PyTorch and transformers side of the step-time benchmark: one training step for each line on stdin.

    python benchmarks/peer_torch.py --case fastmim_vit_base [--batch 32] [--threads 2]

It needs Linux and an environment with torch and transformers. benchmarks/step.py runs it as a subprocess and alternates
its steps with this project's. It prints one line after the first step and one for each line on stdin:

    (start)  ready <seconds from process start to the end of the first step>
    step     time <seconds of one full training step on a fresh batch made just before it>
    quit     peak <largest resident size in bytes>, then it ends

The cases pre-train in float32 with AdamW. FastMIM: a ViT or Swin with a learned RGB mask token on 75 % of the blocks, a
small transformer decoder, HOG targets computed in the step, mean squared error on the masked blocks. SimMIM: the
library's SwinForMaskedImageModeling with 60 % of the 32-pixel blocks masked and gradients clipped.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SwinConfig, SwinForMaskedImageModeling, SwinModel, ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTLayer

DECODER_WIDTH = 256
DECODER_HEADS = 8
BINS = 9
CELL = 8
SEED = 0
SWIN_BASE = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "drop_path_rate": 0.0}


class Parser(argparse.ArgumentParser):
    """Print an error of the command line as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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


class SimMim(nn.Module):
    """Hugging Face's SimMIM with masks drawn in the step: 22 of 36 blocks at 192 pixels."""

    def __init__(self, image_size: int, window: int) -> None:
        super().__init__()
        self.grid = image_size // 32
        self.network = SwinForMaskedImageModeling(swin_config(image_size, window))

    def forward(self, images: Tensor) -> Tensor:
        blocks = self.grid**2
        masked = draw_mask(images.shape[0], blocks, math.ceil(blocks * 0.6))
        patches = enlarge(masked.view(-1, 1, self.grid, self.grid), 8)  # 32 pixels are 8 patches
        return self.network(images, bool_masked_pos=patches.flatten(1)).loss


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


def swin_config(image_size: int, window: int) -> SwinConfig:
    return SwinConfig(image_size=image_size, window_size=window, encoder_stride=32, layer_norm_eps=1e-5, **SWIN_BASE)


def draw_mask(batch: int, blocks: int, count: int) -> Tensor:
    """Mask `count` random blocks of each sample."""
    return torch.rand(batch, blocks).argsort(1).argsort(1) < count


def stepper(model: nn.Module, image_size: int, batch: int, beta: float, clip: float) -> Callable[[], float]:
    """Return a function that runs one step and returns its seconds."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # measured: for these parameters fused is faster than foreach and than the plain loop
    optimizer = torch.optim.AdamW(trained, lr=1.5e-4, betas=(0.9, beta), weight_decay=0.05, fused=True)

    def step() -> float:
        images = torch.randn(batch, 3, image_size, image_size)
        start = time.perf_counter()
        loss = model(images)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        return time.perf_counter() - start

    return step


def fastmim_vit_base(batch: int) -> Callable[[], float]:
    encoder = ViTModel(vit_config(768, 12, 12, 128, 1e-6), add_pooling_layer=False)
    encoder.embeddings.position_embeddings.requires_grad_(False)  # fixed in FastMIM
    return stepper(FastMim(encoder, 768, 16, 1, 1e-6), 128, batch, 0.95, 0.0)


def fastmim_swin_base(batch: int) -> Callable[[], float]:
    encoder = SwinModel(swin_config(128, 4), add_pooling_layer=False)
    return stepper(FastMim(encoder, 1024, 32, 4, 1e-5), 128, batch, 0.95, 0.0)


def simmim_swin_base(batch: int) -> Callable[[], float]:
    return stepper(SimMim(192, 6), 192, batch, 0.999, 5.0)


CASES: dict[str, Callable[[int], Callable[[], float]]] = {
    "fastmim_vit_base": fastmim_vit_base,
    "fastmim_swin_base": fastmim_swin_base,
    "simmim_swin_base": simmim_swin_base,
}


def seconds_since_process_start() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of the line; the split drops the first two
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_memory() -> int:
    """Return the largest resident size of this process in bytes.

    ru_maxrss starts at the peak of the parent process, so it is used only without VmHWM.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="peer_torch.py", description="Time training steps of PyTorch, one for each line on stdin.")
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--batch", type=positive, default=32, help="images in a step (%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    step = CASES[args.case](args.batch)
    step()
    write_line(f"ready {seconds_since_process_start():.3f}")
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            write_line(f"time {step():.6f}")
        elif command == "quit":
            write_line(f"peak {peak_memory()}")
            return 0
        else:
            sys.stderr.write(f"peer_torch.py: error: unknown command {command!r}, expected step or quit\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
