"""The PyTorch and transformers side of the step-time benchmark: one training step for each line on stdin.

    python benchmarks/peer_torch.py --case fastmim_vit_base [--batch 32] [--image-size 128] [--heads 12]
                                    [--threads 2]

It needs Linux and an environment with torch and transformers; a benchmark script runs it as a subprocess, so
that its steps and ours take turns. It prints one line after the first step and one for each line on stdin:

    (start)  ready <seconds from process start to the end of the first step>
    step     time <seconds of one full training step on a fresh batch made just before it>
    quit     peak <largest resident size in bytes>, then it ends

The work is FastMIM pre-training in float32: a ViT that sees a learned RGB mask token on 75 % of the 16-pixel
blocks, a one-block decoder, HOG targets computed in the step, mean squared error on the masked blocks, AdamW.
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
from transformers import ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTLayer

PATCH = 16
WIDTH = 768
LAYERS = 12
DECODER_WIDTH = 256
DECODER_HEADS = 8
MASK_RATIO = 0.75
BINS = 9
CELL = 8
EPS = 1e-6
SEED = 0


class Parser(argparse.ArgumentParser):
    """Report a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class HogTarget(nn.Module):
    """Histograms of oriented gradients of each colour channel, as one row of values for each patch."""

    sobel: Tensor

    def __init__(self) -> None:
        super().__init__()
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
        side = PATCH // CELL
        patches = cells.view(batch, channels * BINS, height // PATCH, side, width // PATCH, side)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class FastMim(nn.Module):
    """Hugging Face's ViT with the mask token, the decoder and the loss of FastMIM."""

    def __init__(self, image_size: int, heads: int) -> None:
        super().__init__()
        self.encoder = ViTModel(vit_config(WIDTH, LAYERS, heads, image_size), add_pooling_layer=False)
        self.encoder.embeddings.position_embeddings.requires_grad_(False)  # FastMIM's are fixed
        self.mask_token = nn.Parameter(torch.empty(1, 3, 1, 1).normal_(std=0.02))
        self.decoder = nn.Sequential(
            nn.Linear(WIDTH, DECODER_WIDTH),
            ViTLayer(vit_config(DECODER_WIDTH, 1, DECODER_HEADS, image_size)),
            nn.LayerNorm(DECODER_WIDTH, eps=EPS),
            nn.Linear(DECODER_WIDTH, 3 * BINS * (PATCH // CELL) ** 2),
        )
        self.hog = HogTarget()

    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[2] // PATCH
        masked = draw_mask(images.shape[0], grid * grid)
        blocks = masked.view(-1, 1, grid, grid).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        hidden = self.encoder(torch.where(blocks, self.mask_token, images)).last_hidden_state
        predicted = self.decoder(hidden)[:, 1:]
        return functional.mse_loss(predicted[masked], self.hog(images)[masked])


def vit_config(width: int, layers: int, heads: int, image_size: int) -> ViTConfig:
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=EPS,
        image_size=image_size,
        patch_size=PATCH,
        attn_implementation="sdpa",
    )


def draw_mask(batch: int, patches: int) -> Tensor:
    """Mask the same number of patches in each sample, at random places."""
    kept = int(patches * (1 - MASK_RATIO))
    return torch.rand(batch, patches).argsort(1).argsort(1) >= kept


def fastmim_vit_base(batch: int, image_size: int, heads: int) -> Callable[[], float]:
    """Build the network; each call of the result runs one step and returns its seconds."""
    model = FastMim(image_size, heads).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Measured on these parameters: fused is faster than foreach and than the plain loop.
    optimizer = torch.optim.AdamW(trained, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> float:
        images = torch.randn(batch, 3, image_size, image_size)
        start = time.perf_counter()
        loss = model(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        return time.perf_counter() - start

    return step


CASES: dict[str, Callable[[int, int, int], Callable[[], float]]] = {"fastmim_vit_base": fastmim_vit_base}


def seconds_since_process_start() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the name, so the 22nd field of the line
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_memory() -> int:
    """Return the largest resident size of this process in bytes.

    ru_maxrss starts at the peak of the process that started this one, so it comes second.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(line: str) -> None:
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
    parser.add_argument("--image-size", type=positive, default=128, help="pixels, a multiple of 16 (%(default)s)")
    parser.add_argument("--heads", type=positive, default=12, help="attention heads (%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch (%(default)s)")
    args = parser.parse_args(argv)
    if args.image_size % PATCH:
        parser.error(f"--image-size {args.image_size} is not a multiple of {PATCH}")
    if WIDTH % args.heads:
        parser.error(f"--heads {args.heads} does not divide {WIDTH}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    step = CASES[args.case](args.batch, args.image_size, args.heads)
    step()
    say(f"ready {seconds_since_process_start():.3f}")
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            say(f"time {step():.6f}")
        elif command == "quit":
            say(f"peak {peak_memory()}")
            return 0
        else:
            sys.stderr.write(f"peer_torch.py: error: unknown command {command!r}, expected step or quit\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
