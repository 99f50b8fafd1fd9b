"""Masked autoencoder (facebookresearch/mae models_mae.py; arXiv 2111.06377)."""

from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal

from ..config import MAEConfig, TransformerDecoderConfig
from ..models import Encoder
from ..models.layers import Linear, parameter, sincos_position
from ..models.tokens import PutTokens
from .decoders import TransformerDecoder
from .masked import MaskedModel
from .masking import resize_mask


class MaskTokenDecoder(TransformerDecoder):
    """A transformer decoder with fixed positions, in which mask tokens stand for what the encoder did not see.

    Args:
        config, in_dim, out_dim, num_prefix_tokens, norm_eps: as in `TransformerDecoder`.
        grid: rows and columns of patch tokens.
    """

    embed: Linear

    def __init__(
        self,
        config: TransformerDecoderConfig,
        in_dim: int,
        out_dim: int,
        num_prefix_tokens: int,
        norm_eps: float,
        grid: tuple[int, int],
    ):
        super().__init__(config, in_dim, out_dim, num_prefix_tokens, norm_eps)
        self.width = config.width
        table = sincos_position(config.width, grid, class_token=False)
        prefix = np.zeros((1, num_prefix_tokens, config.width), np.float32)
        self.pos_embed = Parameter(Tensor(np.concatenate([prefix, table], axis=1)), requires_grad=False)
        self.put = PutTokens()

    def decode(self, sequence: Tensor, keep: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
        """The encoder's output of the visible tokens -> predictions of all tokens (B, N, out_dim).

        Args:
            sequence: (B, prefix + K, in_dim).
            keep: indices (B, K) int32 of the visible tokens.
            hidden: (B, N), 1 for a token that the encoder did not see.
            mask_token: (1, 1, width).
        """
        batch, count, dim = sequence.shape
        tokens = hidden.shape[1]
        x = self.embed(sequence.reshape(batch * count, dim)).reshape(batch, count, self.width)
        patches = self.put(x[:, self.prefix :], keep, tokens)
        unseen = ops.tile(hidden.expand_dims(-1), (1, 1, self.width))
        patches = patches + ops.tile(mask_token, (batch, tokens, 1)) * unseen
        if self.prefix:
            patches = ops.cat((x[:, : self.prefix], patches), axis=1)
        length = self.prefix + tokens
        placed = patches + ops.tile(self.pos_embed, (batch, 1, 1))
        return self.predict(placed.reshape(batch * length, self.width), batch, length)


class MaskedAutoencoder(MaskedModel):
    """Encode the visible tokens alone, decode them together with mask tokens, predict the target of the hidden ones.

    Args:
        encoder: one that can run on some of its tokens (`drops_tokens` of its configuration).
        config: mask, target, decoder and loss.
        image_size, teacher: as in `MaskedModel`.
    """

    def __init__(
        self, encoder: Encoder, config: MAEConfig, image_size: tuple[int, int], teacher: nn.Cell | None = None
    ):
        super().__init__(encoder, config, image_size, teacher)
        decoder = config.decoder
        prefix, dim = encoder.num_prefix_tokens, self.target.dim
        self.mask_token = parameter(Normal(0.02), 1, 1, decoder.width)
        self.decoder = MaskTokenDecoder(decoder, encoder.out_dim, dim, prefix, encoder.norm_eps, self.grid)
        rows, cols = self.mask.grid
        blocks = self.grid[0] // rows * (self.grid[1] // cols)  # tokens of a block
        self.visible = self.mask.visible * blocks
        self.order = Tensor(np.arange(self.grid[0] * self.grid[1], dtype=np.float32).reshape(1, -1))

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        hidden, keep = self.split(mask)
        sequence = self.encoder.encode(self.encoder.embed(image), keep)
        return self.decoder.decode(sequence, keep, hidden, self.mask_token)

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Block mask (B, rows, cols) -> hidden tokens (B, N), 1 = hidden, and indices (B, K) int32 of the others."""
        batch, count = mask.shape[0], self.order.shape[1]
        hidden = resize_mask(mask, self.grid).reshape(batch, count)
        order = ops.argsort(hidden * count + ops.tile(self.order, (batch, 1)), axis=1)  # visible ones first
        return hidden, order[:, : self.visible].astype(mindspore.int32)
