"""Decoders: from encoder tokens to predictions of the target."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, nn
from mindspore.common.initializer import Uniform

from ..config import DecoderConfig, LinearDecoderConfig, TransformerDecoderConfig
from ..models.layers import Block, LayerNorm, Linear


class LinearDecoder(nn.Cell):
    """SimMIM's decoder, a 1x1 convolution, as one linear layer on the patch tokens.

    Args:
        config: not used.
        in_dim: width of the encoder's tokens.
        out_dim: values predicted per token.
        num_prefix_tokens: prefix tokens, which are dropped.
        norm_eps: not used.
    """

    def __init__(self, config: LinearDecoderConfig, in_dim: int, out_dim: int, num_prefix_tokens: int, norm_eps: float):
        super().__init__()
        self.num_prefix_tokens, self.out_dim = num_prefix_tokens, out_dim
        self.pred = Linear(in_dim, out_dim, init=Uniform(in_dim**-0.5))  # as PyTorch initialises a convolution

    def construct(self, sequence: Tensor) -> Tensor:
        """(B, num_prefix_tokens + N, in_dim) -> (B, N, out_dim)."""
        patches = sequence[:, self.num_prefix_tokens :]
        batch, tokens, dim = patches.shape
        return self.pred(patches.reshape(batch * tokens, dim)).reshape(batch, tokens, self.out_dim)


class TransformerDecoder(nn.Cell):
    """FastMIM's decoder: linear, blocks, norm, linear; without positions.

    With depth 0 there is no first linear layer; norm and last linear layer act on the encoder's output.

    Args:
        config: width, heads and depth.
        in_dim: width of the encoder's tokens.
        out_dim: values predicted per token.
        num_prefix_tokens: prefix tokens; they pass through the blocks and are dropped at the end.
        norm_eps: epsilon of the norms.
    """

    def __init__(
        self,
        config: TransformerDecoderConfig,
        in_dim: int,
        out_dim: int,
        num_prefix_tokens: int,
        norm_eps: float,
    ):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.depth = config.depth
        self.out_dim = out_dim
        width = config.width
        self.embed = Linear(in_dim, width) if config.depth else None
        self.blocks = nn.CellList(
            [
                Block(width, config.heads, config.mlp_ratio, config.qkv_bias, norm_eps=norm_eps)
                for _ in range(config.depth)
            ]
        )
        self.norm = LayerNorm(width, norm_eps)
        self.pred = Linear(width, out_dim)

    def construct(self, sequence: Tensor) -> Tensor:
        """(B, num_prefix_tokens + N, in_dim) -> (B, N, out_dim)."""
        batch, length, dim = sequence.shape
        rows = sequence.reshape(batch * length, dim)
        if self.embed is not None:
            rows = self.embed(rows)
        return self.predict(rows, batch, length)

    def predict(self, rows: Tensor, batch: int, length: int) -> Tensor:
        """Rows (B * length, width) -> predictions of the patch tokens (B, N, out_dim)."""
        for number in range(self.depth):
            rows = self.blocks[number](rows, batch, length)
        return self.pred(self.norm(rows)).reshape(batch, length, self.out_dim)[:, self.num_prefix_tokens :]


#: configuration -> decoder
DECODERS: dict[type[DecoderConfig], Callable[..., nn.Cell]] = {
    LinearDecoderConfig: LinearDecoder,
    TransformerDecoderConfig: TransformerDecoder,
}


def build_decoder(config: DecoderConfig, in_dim: int, out_dim: int, num_prefix_tokens: int, norm_eps: float) -> nn.Cell:
    """The decoder of a configuration; arguments as in `TransformerDecoder`."""
    return DECODERS[type(config)](config, in_dim, out_dim, num_prefix_tokens, norm_eps)
