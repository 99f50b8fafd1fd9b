"""The cases of the benchmark, and the matrix products that each needs; without MindSpore."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.config import Recipe
from src.config.cost import BlockGroup
from src.config.files import load_recipe

#: training: case -> recipe, and overrides that make its network equal to the peer's
TRAINING = {
    "fastmim_vit_base": ("config/fastmim/vit_base_128_800e_pretrain.yaml", ["encoder.num_heads=12"]),
    "fastmim_swin_base": ("config/fastmim/swin_base_128_400e_pretrain.yaml", []),
    "simmim_swin_base": ("config/simmim/swin_base_192_100e_pretrain.yaml", []),
    "simmim_vit_base": ("config/simmim/vit_base_224_800e_pretrain.yaml", []),
    # without a peer; the teacher has random weights
    "manifold_deit_tiny": ("config/manifold_kd/deit_tiny_from_cait_s24.yaml", []),
}
#: inference at 224 pixels: case -> name for `load_model`
INFERENCE = {"infer_vit_base": "fastmim_vit_base", "infer_swin_base": "fastmim_swin_base"}
#: `count` times (batch, m, k) x (batch, k, n), as (count, batch, m, k, n, passes); passes: 1 forward, 2 and the
#: gradient of the second factor, 3 and that of the first
Product = tuple[int, int, int, int, int, int]


def recipe_of(case: str, overrides: Sequence[str] = ()) -> Recipe:
    if case in INFERENCE:
        return load_recipe(ROOT / "config/_models" / f"{INFERENCE[case]}.yaml", ["encoder.image_size=224", *overrides])
    path, own = TRAINING[case]
    return load_recipe(ROOT / path, [*own, *overrides])


def operations(recipe: Recipe) -> int:
    """Multiply-adds of the forward pass of one image."""
    return sum(recipe.method.flops(recipe.trained_encoder).values())


def products(recipe: Recipe, batch: int) -> list[Product]:
    """Matrix products of a training step with mask, encoder and decoder, or of a classifier's forward pass."""
    encoder, method = recipe.trained_encoder, recipe.method
    passes = 1 if method.classifier else 3
    patches = batch * encoder.patch_grid[0] * encoder.patch_grid[1]
    # masked tokens leave the gradient of the pixels out; a masked colour needs it
    embed_passes = 2 if getattr(method, "corrupt", "") == "token" else passes
    found = [(1, 1, patches, encoder.in_chans * encoder.patch_size**2, encoder.embed_dim, embed_passes)]
    groups = encoder.block_groups()
    for group in groups:
        found += block_products(group, batch, passes)
    for group, following in pairwise(groups):  # patch merging
        found.append((1, 1, batch * following.tokens, 4 * group.dim, 2 * group.dim, passes))
    if method.classifier:
        return [*found, (1, 1, batch, encoder.out_dim, method.classifier.num_classes, passes)]
    return found + decoder_products(recipe, batch, passes)


def block_products(group: BlockGroup, batch: int, passes: int) -> list[Product]:
    count, dim, hidden, area = group.depth, group.dim, int(group.dim * group.mlp_ratio), group.window_tokens
    rows, padded, head = batch * group.tokens, batch * group.padded_tokens, dim // group.heads
    windows = padded // area * group.heads
    return [
        (count, 1, padded, dim, 3 * dim, passes),
        (count, windows, area, head, area, passes),
        (count, windows, area, area, head, passes),
        (count, 1, padded, dim, dim, passes),
        (count, 1, rows, dim, hidden, passes),
        (count, 1, rows, hidden, dim, passes),
    ]


def decoder_products(recipe: Recipe, batch: int, passes: int) -> list[Product]:
    encoder, decoder = recipe.trained_encoder, recipe.method.decoder
    values = recipe.method.target.values(encoder.stride, encoder.in_chans)
    if decoder.name == "linear":
        return [(1, 1, batch * encoder.num_tokens, encoder.out_dim, values, passes)]
    rows = batch * encoder.output_length
    ends = [(1, 1, rows, encoder.out_dim, decoder.width, passes), (1, 1, rows, decoder.width, values, passes)]
    return ends + block_products(decoder.blocks(encoder), batch, passes)
