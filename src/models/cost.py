"""What a forward pass costs, as a pure function of the configuration: operations, and values kept for the gradient.

Operations are counted as mmengine and fvcore count them, whose figures the model tables print: one multiply-add is one
FLOP. For N rows of C channels, T tokens that attend to one another:

    linear layer, convolution      N * C_in * C_out (a patch projection: C_in = channels * patch**2)
    attention                      4 * N * C**2 for q, k, v and the projection, 2 * N * T * C for scores and mixing
    MLP                            2 * mlp_ratio * N * C**2
    talking heads, of H heads      2 * N * T * H**2 besides
    norm                           5 * N * C
    pooling                        N * C

Windows that do not divide a map are padded, and padded tokens are projected and attended like others. Not counted, as
there: activations, softmax, additions, position biases (tables and networks of positions are worked out once per batch,
not per image). Not counted either: the target of masked image modelling and its loss.

Check (tests/test_plan.py): mmpretrain's model tables, to the last digit. Their figure of a pre-training network is the
encoder's alone at 224 pixels, whatever the recipe trains at; that of a classifier leaves its head out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..config import (
    CaiTConfig,
    ClassifyConfig,
    EncoderConfig,
    MIMConfig,
    SwinConfig,
    SwinV2Config,
    TransformerDecoderConfig,
    ViTConfig,
)
from .swin import Place

NORM = 5  # operations per value


@dataclass(frozen=True)
class Stage:
    """Equal transformer blocks.

    Attributes:
        depth: blocks.
        rows: tokens of an image.
        attending: those in attention, more than `rows` where windows are padded.
        together: tokens that attend to one another.
        dim, heads, mlp_ratio: sizes.
        talking: whether linear layers mix the heads before and after the softmax.
    """

    depth: int
    rows: int
    attending: int
    together: int
    dim: int
    heads: int
    mlp_ratio: float
    talking: bool = False

    def flops(self) -> int:
        """Multiply-adds of all blocks."""
        attention = 4 * self.attending * self.dim**2 + 2 * self.attending * self.together * self.dim
        attention += 2 * self.attending * self.together * self.heads**2 * self.talking
        mlp = 2 * self.rows * self.dim * int(self.dim * self.mlp_ratio)
        return self.depth * (attention + mlp + 2 * NORM * self.rows * self.dim)

    def kept(self) -> int:
        """Values for the gradient: norms, q, k, v, scaled q, mixture, sums, scores and their softmax, MLP inside."""
        rows = 9 * self.dim + 2 * int(self.dim * self.mlp_ratio)
        scores = self.attending * self.together * self.heads
        return self.depth * (self.rows * rows + (4 if self.talking else 2) * scores)


def stages(config: EncoderConfig) -> list[Stage]:
    """The blocks of an encoder."""
    if isinstance(config, CaiTConfig):
        tokens, sizes = config.num_tokens, (config.embed_dim, config.num_heads, config.mlp_ratio)
        return [Stage(config.depth, tokens, tokens, tokens, *sizes, talking=True)]
    if isinstance(config, ViTConfig):
        length = output_length(config)
        return [Stage(config.depth, length, length, length, config.embed_dim, config.num_heads, config.mlp_ratio)]
    found = []
    for number, depth in enumerate(config.depths):
        rows, cols = config.stage_maps[number]
        window = Place((rows, cols), config.window_size, shifted=False, cap=config.cap_window).window
        padded = -(-rows // window) * -(-cols // window) * window**2
        sizes = config.embed_dim << number, config.num_heads[number], config.mlp_ratio
        found.append(Stage(depth, rows * cols, padded, window**2, *sizes))
    return found


def decoder_stage(encoder: EncoderConfig, decoder: TransformerDecoderConfig) -> Stage:
    """The blocks of a decoder; a class token takes part."""
    length = output_length(encoder)
    return Stage(decoder.depth, length, length, length, decoder.width, decoder.width // 32, decoder.mlp_ratio)


def output_length(encoder: EncoderConfig) -> int:
    """Output tokens, class and distillation token included."""
    return encoder.num_tokens + (0 if isinstance(encoder, SwinConfig) else encoder.class_token + encoder.distilled)


def forward_flops(encoder: EncoderConfig, method: MIMConfig | ClassifyConfig) -> dict[str, int]:
    """Part of the network -> multiply-adds of one image; the parts are those the Method has besides the encoder."""
    if isinstance(method, MIMConfig):
        return {"encoder": encoder_flops(encoder), "decoder": decoder_flops(encoder, method)}
    width = encoder.out_dim
    return {
        "encoder": encoder_flops(encoder, final_norm=not method.fc_norm),
        "pooling": (encoder.num_tokens if method.pool == "mean" else 0) * width + NORM * width * method.fc_norm,
        "head": width * method.num_classes * (1 if isinstance(encoder, SwinConfig) else 1 + encoder.distilled),
    }


def encoder_flops(config: EncoderConfig, final_norm: bool = True) -> int:
    """Image to tokens."""
    parts = stages(config)
    height, width = config.image_size
    pixels = height * width * config.in_chans
    total = pixels * config.embed_dim + sum(stage.flops() for stage in parts)
    total += NORM * output_length(config) * config.out_dim * final_norm
    if isinstance(config, CaiTConfig):
        total += class_attention_flops(config)
    if not isinstance(config, SwinConfig):
        return total
    total += NORM * parts[0].rows * parts[0].dim * config.patch_norm
    second = isinstance(config, SwinV2Config)
    for stage, following in itertools.pairwise(parts):  # merging: 4 C to 2 C, a norm before it, in version 2 after it
        total += following.rows * (8 * stage.dim**2 + NORM * stage.dim * (2 if second else 4))
    if isinstance(config, SwinV2Config) and config.main_norm_every:
        total += sum(s.depth // config.main_norm_every * NORM * s.rows * s.dim for s in parts)
    return total


def class_attention_flops(config: CaiTConfig) -> int:
    """The blocks in which the class token alone attends, to itself and the patches."""
    length, dim = output_length(config), config.embed_dim
    attention = 2 * length * dim**2 + 2 * dim**2 + 2 * length * dim  # k and v; q and the projection; scores and mixing
    mlp = 2 * dim * int(dim * config.mlp_ratio_token_only)
    return config.depth_token_only * (attention + mlp + NORM * (length + 1) * dim)


def decoder_flops(encoder: EncoderConfig, method: MIMConfig) -> int:
    """Encoder's output to prediction."""
    values, decoder = method.target.values(encoder.stride, encoder.in_chans), method.decoder
    if not isinstance(decoder, TransformerDecoderConfig):
        return encoder.num_tokens * encoder.out_dim * values
    inside = encoder.out_dim * decoder.width if decoder.depth else 0
    outside = NORM * decoder.width + decoder.width * values
    return output_length(encoder) * (inside + outside) + decoder_stage(encoder, decoder).flops()


def kept_values(encoder: EncoderConfig, method: MIMConfig | ClassifyConfig) -> int:
    """Values of one image that the gradient needs: the image and the activations of all blocks.

    For N rows of C channels with H heads a block keeps N * (9 C + 2 * mlp_ratio * C), and 2 * N * T * H for the scores
    before and after the softmax, twice that with talking heads. Embedding, merging, class-attention blocks, head and
    linear decoder are left out, as small.
    """
    total = encoder.in_chans * encoder.image_size[0] * encoder.image_size[1]
    total += sum(stage.kept() for stage in stages(encoder))
    if isinstance(method, MIMConfig) and isinstance(method.decoder, TransformerDecoderConfig):
        total += decoder_stage(encoder, method.decoder).kept()
    return total
