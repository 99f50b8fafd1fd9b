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
    """A transformer decoder with fixed positions and a mask token in place of each hidden token.

    Args:
        config, in_dim, out_dim, num_prefix_tokens, norm_eps: as in `TransformerDecoder`.
        grid: patch tokens along height and width.
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
        prefix_positions = np.zeros((1, num_prefix_tokens, config.width), np.float32)
        self.pos_embed = Parameter(Tensor(np.concatenate([prefix_positions, table], axis=1)), requires_grad=False)
        self.put = PutTokens()

    def decode(self, sequence: Tensor, keep: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
        """Encoder output of the visible tokens -> predictions of all tokens (B, N, out_dim).

        Args:
            sequence: (B, num_prefix_tokens + K, in_dim).
            keep: indices (B, K) int32 of the visible tokens.
            hidden: (B, N), 1 for a hidden token.
            mask_token: (1, 1, width).
        """
        batch, count, dim = sequence.shape
        tokens = hidden.shape[1]
        x = self.embed(sequence.reshape(batch * count, dim)).reshape(batch, count, self.width)
        all_tokens = self.put(x[:, self.num_prefix_tokens :], keep, tokens)
        is_hidden = ops.tile(hidden.expand_dims(-1), (1, 1, self.width))
        all_tokens = all_tokens + ops.tile(mask_token, (batch, tokens, 1)) * is_hidden
        if self.num_prefix_tokens:
            all_tokens = ops.cat((x[:, : self.num_prefix_tokens], all_tokens), axis=1)
        length = self.num_prefix_tokens + tokens
        positioned = all_tokens + ops.tile(self.pos_embed, (batch, 1, 1))
        return self.predict(positioned.reshape(batch * length, self.width), batch, length)


class MaskedAutoencoder(MaskedModel):
    """Encode the visible tokens, decode them together with mask tokens, predict the target of the hidden tokens.

    Args:
        encoder: one that can run on a part of the tokens (`drops_tokens` of its configuration).
        config: mask, target, decoder and loss.
        image_size, teacher: as in `MaskedModel`.
    """

    def __init__(
        self, encoder: Encoder, config: MAEConfig, image_size: tuple[int, int], teacher: nn.Cell | None = None
    ):
        super().__init__(encoder, config, image_size, teacher)
        decoder = config.decoder
        num_prefix, dim = encoder.num_prefix_tokens, self.target.dim
        self.mask_token = parameter(Normal(0.02), 1, 1, decoder.width)
        self.decoder = MaskTokenDecoder(decoder, encoder.out_dim, dim, num_prefix, encoder.norm_eps, self.grid)
        tokens_per_block = self.grid[0] // self.mask.grid[0] * (self.grid[1] // self.mask.grid[1])
        self.num_visible = self.mask.num_visible * tokens_per_block
        self.order = Tensor(np.arange(self.grid[0] * self.grid[1], dtype=np.float32).reshape(1, -1))

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        hidden, keep = self.split(mask)
        sequence = self.encoder.encode(self.encoder.embed(image), keep)
        return self.decoder.decode(sequence, keep, hidden, self.mask_token)

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Block mask (B, h, w) -> token mask (B, N), 1 = hidden, and indices (B, K) int32 of the visible tokens."""
        batch, count = mask.shape[0], self.order.shape[1]
        hidden = resize_mask(mask, self.grid).reshape(batch, count)
        order = ops.argsort(hidden * count + ops.tile(self.order, (batch, 1)), axis=1)  # visible tokens first
        return hidden, order[:, : self.num_visible].astype(mindspore.int32)
