"""CaiT as an `Encoder` (arXiv 2103.17239; parameter names of timm models/cait.py).

Patch tokens pass through blocks with talking heads. The class token is added after them, for the last blocks, which
change the class token only. A masked image model whose decoder drops the class token gives these last blocks no
gradient; only weight decay changes them.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Initializer

from ..config import CaiTConfig
from ..operations import rows
from ..operations.forms import build
from .encoder import Encoder
from .layers import (
    Attention,
    Block,
    DropPath,
    LayerNorm,
    Linear,
    PatchEmbed,
    parameter,
    trunc_normal,
    weight_init,
)
from .tokens import TakeTokens


class HeadMixing(Linear):
    """A linear layer over the heads: (B, heads, N, N) -> the same shape."""

    def __init__(self, num_heads: int, init: Initializer):
        super().__init__(num_heads, num_heads, init=init)
        self.affine = build(rows.ChannelAffine)

    def construct(self, x: Tensor) -> Tensor:
        batch, heads, queries, keys = x.shape
        mixed = self.affine(x.reshape(batch, heads, queries * keys), self.weight, self.bias)
        return mixed.reshape(batch, heads, queries, keys)


class TalkingHeads(Attention):
    """Self-attention whose heads are mixed before and after the softmax (arXiv 2003.02436)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, init: tuple[Initializer, Initializer]):
        super().__init__(dim, num_heads, qkv_bias, init=init)
        self.proj_l = HeadMixing(num_heads, init[0])
        self.proj_w = HeadMixing(num_heads, init[0])

    def build_attend(self, positions: rows.Positions | None) -> nn.Cell:
        return build(rows.HeadScores, self.num_heads, self.head_dim**-0.5)

    def construct(
        self, qkv: Tensor, batch: int, tokens: int, bias: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        scores, v = self.attend.scores(qkv, batch, tokens)
        return self.proj(self.attend.mixed(self.proj_w(self.attend.softmax(self.proj_l(scores))), v, batch), onto)


class ClassAttention(nn.Cell):
    """Attention of each image's first token to all its tokens: (B*N, C) -> (B, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, init: tuple[Initializer, Initializer]):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim, qkv_bias, init[0])
        self.k = Linear(dim, dim, qkv_bias, init[0])
        self.v = Linear(dim, dim, qkv_bias, init[0])
        self.proj = Linear(dim, dim, init=init[1])
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = build(rows.Softmax)
        self.split_heads = build(rows.SplitHeads)

    def construct(self, x: Tensor, batch: int, tokens: int) -> Tensor:
        first = x.reshape(batch, tokens, self.dim)[:, 0]
        q = self.split_heads(self.q(first) * self.scale, batch, 1, self.num_heads)
        k = self.split_heads(self.k(x), batch, tokens, self.num_heads)
        v = self.split_heads(self.v(x), batch, tokens, self.num_heads)
        mixed = self.mix(self.softmax(self.scores(q, k)), v)  # (B, heads, 1, C / heads)
        return self.proj(mixed.reshape(batch, self.dim))


class ClassBlock(Block):
    """A block that updates only the class token, the first token of each image."""

    def construct(
        self,
        x: Tensor,
        batch: int,
        tokens: int,
        factors: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B*N, C) -> class tokens (B, C)."""
        token = x.reshape(batch, tokens, x.shape[1])[:, 0]
        return self.add_branches(token, self.attn(self.norm1(x), batch, tokens), factors)


class CaiT(Encoder):
    """Patch embedding, patch positions, talking-heads blocks, class-attention blocks, final norm.

    Args:
        config: sizes; `image_size` determines the length of the position table.
        final_norm: False omits the final norm, for a norm after pooling.
    """

    def __init__(self, config: CaiTConfig, final_norm: bool = True):
        super().__init__()
        dim, sizes = config.embed_dim, (config.embed_dim, config.num_heads)
        self.in_chans = config.in_chans
        self.patch_size = self.stride = config.patch_size
        self.embed_dim = self.out_dim = dim
        self.depth = config.depth
        self.depth_token_only = config.depth_token_only
        self.num_layers = config.depth + 2
        self.num_prefix_tokens = 1
        self.norm_eps = config.norm_eps
        init = weight_init("trunc_normal")
        self.cls_token = parameter(trunc_normal(), 1, 1, dim)
        self.pos_embed = parameter(trunc_normal(), 1, config.num_tokens, dim)
        self.patch_embed = PatchEmbed(config.in_chans, config.patch_size, dim)
        self.blocks = nn.CellList(
            [
                Block(
                    *sizes,
                    config.mlp_ratio,
                    norm_eps=config.norm_eps,
                    layer_scale=config.layer_scale,
                    init=init,
                    attention=TalkingHeads(*sizes, config.qkv_bias, init),
                )
                for _ in range(config.depth)
            ]
        )
        self.blocks_token_only = nn.CellList(
            [
                ClassBlock(
                    *sizes,
                    config.mlp_ratio_token_only,
                    norm_eps=config.norm_eps,
                    layer_scale=config.layer_scale,
                    init=init,
                    attention=ClassAttention(*sizes, config.qkv_bias, init),
                )
                for _ in range(config.depth_token_only)
            ]
        )
        self.norm = LayerNorm(dim, config.norm_eps) if final_norm else None
        self.take = TakeTokens()
        self.drop_path = DropPath(config.drop_path, config.depth, constant=True) if config.drop_path else None

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def outputs(
        self, tokens: Tensor, indices: tuple[int, ...], keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As in `Encoder`; `indices` count the talking-heads blocks, whose sequences are the patch tokens (B, N, C)."""
        tokens = tokens + ops.tile(self.pos_embed, (tokens.shape[0], 1, 1))
        if keep is not None:
            tokens = self.take(tokens, keep)
        batch, length, dim = tokens.shape
        rows, selected = self._run(tokens, indices)
        patches = rows.reshape(batch, length, dim)
        token = ops.tile(self.cls_token.reshape(1, dim), (batch, 1))
        for number in range(self.depth_token_only):
            token = self.blocks_token_only[number](self._with_token(token, patches), batch, 1 + length)
        sequence = self._with_token(token, patches)
        if self.norm is not None:
            sequence = self.norm(sequence)
        return sequence.reshape(batch, 1 + length, dim), tuple([x.reshape(tokens.shape) for x in selected])

    def _run(self, tokens: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Run the patch blocks on tokens with positions (B, N, C).

        Returns:
            Rows (B*N, C) after the last block, and after each block in `indices`.
        """
        batch, length = tokens.shape[0], tokens.shape[1]
        x = tokens.reshape(batch * length, self.out_dim)
        factors = None
        if self.drop_path is not None and self.training:
            factors = self.drop_path.of_rows(batch, length)
        selected = []
        for number in range(self.depth):
            block_factors = None if factors is None else (factors[number, 0], factors[number, 1])
            x = self.blocks[number](x, batch, length, block_factors)
            if number in indices:
                selected.append(x)
        return x, selected

    def _with_token(self, token: Tensor, patches: Tensor) -> Tensor:
        """Class tokens (B, C) and patch tokens (B, N, C) -> rows (B*(1+N), C)."""
        return ops.cat((token.expand_dims(1), patches), axis=1).reshape(-1, self.out_dim)

    def layer_of(self, name: str) -> int:
        """As in timm's group_matcher, the class-attention blocks share the layers of the last patch blocks."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        if name.startswith("blocks_token_only."):
            return max(1, self.depth - self.depth_token_only + 1 + int(name.split(".")[1]))
        return self.depth

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}
