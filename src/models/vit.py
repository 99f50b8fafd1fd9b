"""Vision Transformer as an `Encoder` (FastMIM mim_vit_pretrain.py and models_vit.py, MAE, timm)."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal

from ..config import ViTConfig
from .encoder import Encoder
from .layers import Block, DropPath, LayerNorm, PatchEmbed, parameter, sincos_position, weight_init
from .relative import RelativeBias, SharedTable, table_entries
from .tokens import TakeTokens


class ViT(Encoder):
    """Patch embedding, prefix tokens, position table, pre-norm blocks, final norm.

    Args:
        config: sizes; `image_size` determines the length of the position table.
        final_norm: False omits the final norm, for a norm after pooling.
    """

    def __init__(self, config: ViTConfig, final_norm: bool = True):
        super().__init__()
        dim = config.embed_dim
        self.in_chans = config.in_chans
        self.patch_size = self.stride = config.patch_size
        self.embed_dim = self.out_dim = dim
        self.depth = config.depth
        self.num_layers = config.depth + 2
        self.num_prefix_tokens = config.class_token + config.distilled
        self.norm_eps = config.norm_eps
        self.cls_token = parameter(Normal(0.02), 1, 1, dim) if config.class_token else None
        self.dist_token = parameter(Normal(0.02), 1, 1, dim) if config.distilled else None
        grid = self.grid(config.image_size)
        self.pos_embed = position_table(config, grid) if config.position != "none" else None
        self.patch_embed = PatchEmbed(config.in_chans, config.patch_size, dim, xavier=config.init == "xavier")
        shared, self.relative = config.relative_position == "shared", config.relative_position != "none"
        self.rel_pos_bias = SharedTable(table_entries(grid), config.num_heads) if shared else None
        positions = RelativeBias(grid, config.num_heads) if self.relative else None
        self.blocks = nn.CellList(
            [
                Block(
                    dim,
                    config.num_heads,
                    config.mlp_ratio,
                    config.qkv_bias,
                    config.k_bias,
                    config.norm_eps,
                    config.layer_scale,
                    positions,
                    table_entries(grid) if config.relative_position == "block" else 0,
                    weight_init(config.init, number),
                )
                for number in range(config.depth)
            ]
        )
        self.norm = LayerNorm(dim, config.norm_eps) if final_norm else None
        self.take = TakeTokens()
        self.drop_path = DropPath(config.drop_path, config.depth) if config.drop_path else None

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def outputs(
        self, tokens: Tensor, indices: tuple[int, ...], keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self._positioned(tokens) if keep is None else self._positioned_visible(tokens, keep)
        shape = x.shape
        rows, selected = self._run(x, indices)
        if self.norm is not None:
            rows = self.norm(rows)
        return rows.reshape(shape), tuple([block.reshape(shape) for block in selected])

    def _positioned(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, C) -> prefix and patch tokens with positions (B, num_prefix_tokens + N, C)."""
        tokens = self._prefixed(tokens)
        if self.pos_embed is None:
            return tokens
        return tokens + ops.tile(self.pos_embed, (tokens.shape[0], 1, 1))

    def _positioned_visible(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """`_positioned` with only the patch tokens in `keep` (B, K), at their positions in the image."""
        if self.relative:
            raise ValueError("relative position tables need all tokens")
        batch, num_prefix = tokens.shape[0], self.num_prefix_tokens
        if self.pos_embed is None:
            return self._prefixed(self.take(tokens, keep))
        tokens = self.take(tokens + ops.tile(self.pos_embed[:, num_prefix:], (batch, 1, 1)), keep)
        if num_prefix == 0:
            return tokens
        first = self._prefixed(tokens)[:, :num_prefix] + ops.tile(self.pos_embed[:, :num_prefix], (batch, 1, 1))
        return ops.cat((first, tokens), axis=1)

    def _prefixed(self, tokens: Tensor) -> Tensor:
        """Class and distillation token, then the patch tokens."""
        batch = tokens.shape[0]
        if self.dist_token is not None:
            tokens = ops.cat((ops.tile(self.dist_token, (batch, 1, 1)), tokens), axis=1)
        if self.cls_token is not None:
            tokens = ops.cat((ops.tile(self.cls_token, (batch, 1, 1)), tokens), axis=1)
        return tokens

    def _run(self, x: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Run all blocks on a sequence (B, length, C).

        Returns:
            Rows (B*length, C) after the last block, and after each block in `indices`.
        """
        batch, length, dim = x.shape
        rows = x.reshape(batch * length, dim)
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.blocks[0].attn.attend.bias_of(self.rel_pos_bias.relative_position_bias_table)
        factors = None
        if self.drop_path is not None and self.training:
            factors = self.drop_path.of_rows(batch, length)
        selected = []
        for number in range(self.depth):
            block_factors = None if factors is None else (factors[number, 0], factors[number, 1])
            rows = self.blocks[number](rows, batch, length, block_factors, bias)
            if number in indices:
                selected.append(rows)
        return rows, selected

    def layer_of(self, name: str) -> int:
        if name.startswith(("cls_token", "dist_token", "pos_embed", "patch_embed")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layers - 1

    def no_weight_decay(self) -> set[str]:
        undecayed = ("cls_token", "dist_token", "pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.parameters_and_names() if name.endswith(undecayed)}


def position_table(config: ViTConfig, grid: tuple[int, int]) -> Parameter:
    """Learned (normal 0.02) or fixed sine-cosine positions; both are parameters, so that each can load the other."""
    length = grid[0] * grid[1] + config.class_token + config.distilled
    if config.position == "learned":
        return parameter(Normal(0.02), 1, length, config.embed_dim)
    table = sincos_position(config.embed_dim, grid, config.class_token)
    return Parameter(Tensor(np.ascontiguousarray(table)), requires_grad=False)
