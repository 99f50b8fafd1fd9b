"""Parameter names of the reference implementations, and ours.

Ours follow the references wherever a name is free to choose: encoder parameters stand below `encoder.`, the decoder's
below `decoder.`. A `Naming` is a list of pairs, theirs and ours, read in both directions; the first that fits counts.
In a pair `*` stands for one part of a dotted name and `**` for the rest of it; `#1` after ours says that theirs is
the second third of it (query, key and value of one matrix).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass

from . import WeightsError

Place = tuple[str, int | None]
#: made again by every implementation
BUFFERS = r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|position_ids|num_batches_tracked)"


@dataclass(frozen=True)
class Naming:
    """Pairs of names; `kept`: a pattern of theirs that have no place in our networks and do no harm without."""

    pairs: tuple[tuple[str, str], ...]
    kept: str = BUFFERS

    def ours(self, name: str) -> Place | None:
        """Our name of one of theirs and which third of it, if only a third; None if it has no place."""
        if re.fullmatch(self.kept, name):
            return None
        for theirs, ours in self.pairs:
            whole, _, part = ours.partition("#")
            found = translated(name, theirs, whole)
            if found:
                return found, int(part) if part else None
        raise WeightsError(f"{name} has no place in our networks")

    def theirs(self, name: str) -> list[tuple[str, int | None]]:
        """Their names of one of ours, in the order of its thirds."""
        found: list[tuple[str, int | None]] = []
        for theirs, ours in self.pairs:
            whole, _, part = ours.partition("#")
            other = translated(name, whole, theirs)
            if other and not part and not found:
                return [(other, None)]
            if other and part:
                found.append((other, int(part)))
        if not found:
            raise WeightsError(f"{name} has no name there")
        return found


def translated(name: str, source: str, target: str) -> str:
    """`name` in the words of another template, empty if it does not fit."""
    match = pattern(source).fullmatch(name)
    if not match:
        return ""
    parts = iter(match.groups())
    return re.sub(r"\*+", lambda _: next(parts), target)


@functools.cache
def pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*\*", "(.+)").replace(r"\*", r"([^.]+)"))


def same(*prefixes: str) -> tuple[tuple[str, str], ...]:
    return tuple((prefix, prefix) for prefix in prefixes)


#: SimMIM while it pre-trains (models/simmim.py)
SIMMIM = Naming((("decoder.0.**", "decoder.pred.**"), ("encoder.mask_token", "mask_token"), *same("encoder.**")))
DECODER = tuple((f"decoder_{part}.**", f"decoder.{part}.**") for part in ("embed", "blocks", "norm", "pred"))
#: FastMIM while it pre-trains: Swin stands below `encoder.` (mim_swin_pretrain.py), ViT does not (mim_vit_pretrain.py)
FASTMIM_STAGES = Naming((*DECODER, *same("mask_token", "encoder.**")))
FASTMIM_BLOCKS = Naming((*DECODER, *same("mask_token"), ("**", "encoder.**")))
#: MAE while it pre-trains (models_mae.py)
MAE = Naming((*DECODER, ("decoder_pos_embed", "decoder.pos_embed"), *same("mask_token"), ("**", "encoder.**")))
#: classifiers and bare encoders as timm 0.5.4, Swin-Transformer, SimMIM, MAE, DeiT and FastMIM's ViT name them
PLAIN = Naming((*same("head.**", "head_dist.**", "fc_norm.**"), ("**", "encoder.**")))
#: FastMIM's Swin classifier calls its final norm fc_norm, and applies it before pooling (mim_swin_finetune.py)
FASTMIM_POOLED = Naming((("fc_norm.**", "encoder.norm.**"), *same("head.**"), ("**", "encoder.**")))
#: timm since 0.9: merging belongs to the stage after it, head and layer scale have a cell of their own
TIMM_STAGES = Naming(
    (
        ("head.fc.**", "head.**"),
        *((f"layers.{n + 1}.downsample.**", f"encoder.layers.{n}.downsample.**") for n in range(9)),
        ("**", "encoder.**"),
    )
)
TIMM_BLOCKS = Naming(
    (*((f"blocks.*.ls{n}.gamma", f"encoder.blocks.*.gamma_{n}") for n in (1, 2)), *PLAIN.pairs),
)


#: Hugging Face's parts of a block: query, key, value, projection, both linear layers of the MLP
OLD_PARTS = (
    *("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
NEW_PARTS = (
    *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    *("mlp.fc1", "mlp.fc2"),
)


def huggingface(prefix: str, names: Collection[str] = ()) -> Naming:
    """Hugging Face's ViT, ViTMAE, Swin and Swin V2, below `prefix` (empty for a bare encoder).

    Args:
        names: of a file, whose version of transformers decides how blocks of a ViT are called.
    """

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    places = "absolute_pos_embed" if "swin" in prefix else "pos_embed"
    new = has(f"{prefix}layers.")
    decoded = "decoder.decoder_encoder.layer.*." if has("decoder.decoder_encoder.") else "decoder.decoder_layers.*."
    pairs = [
        ("classifier.**", "head.**"),
        ("decoder.0.**", "decoder.pred.**"),
        *((f"decoder.decoder_{part}.**", f"decoder.{part}.**") for part in ("embed", "norm", "pred")),
        ("decoder.decoder_pos_embed", "decoder.pos_embed"),
        ("decoder.mask_token", "mask_token"),
        *block_pairs(decoded, "decoder.blocks.*.", NEW_PARTS if has("decoder.decoder_layers.0.mlp.") else OLD_PARTS),
    ]
    own = [
        ("embeddings.mask_token", "mask_token"),
        ("embeddings.cls_token", "encoder.cls_token"),
        ("embeddings.position_embeddings", f"encoder.{places}"),
        ("embeddings.patch_embeddings.projection.**", "encoder.patch_embed.proj.**"),
        ("embeddings.norm.**", "encoder.patch_embed.norm.**"),
        ("layernorm.**", "encoder.norm.**"),
        ("encoder.layers.*.downsample.**", "encoder.layers.*.downsample.**"),
        *block_pairs("layers.*." if new else "encoder.layer.*.", "encoder.blocks.*.", NEW_PARTS if new else OLD_PARTS),
    ]
    block, ours = "encoder.layers.*.blocks.*.", "encoder.layers.*.blocks.*."
    attention = f"{block}attention.self."
    if "swinv2" in prefix:
        own += [(f"{attention}{part}.bias", f"{ours}attn.{part[0]}_bias") for part in ("query", "value")]
    own += [
        (f"{attention}continuous_position_bias_mlp.**", f"{ours}attn.cpb_mlp.**"),
        (f"{attention}relative_position_bias_table", f"{ours}attn.relative_position_bias_table"),
        (f"{attention}logit_scale", f"{ours}attn.logit_scale"),
        *block_pairs(block, ours, tuple(part.replace("attention.attention.", "attention.self.") for part in OLD_PARTS)),
    ]
    pairs += [(prefix + theirs, ours) for theirs, ours in own]
    return Naming(tuple(pairs), rf"({re.escape(prefix)})?pooler\..*|{BUFFERS}")


def block_pairs(theirs: str, ours: str, parts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names of a block; `parts` as `OLD_PARTS` has them."""
    query, key, value, projection, first, second = parts
    return [
        *((f"{theirs}{part}.**", f"{ours}attn.qkv.**#{third}") for third, part in enumerate((query, key, value))),
        (f"{theirs}{projection}.**", f"{ours}attn.proj.**"),
        (f"{theirs}{first}.**", f"{ours}mlp.fc1.**"),
        (f"{theirs}{second}.**", f"{ours}mlp.fc2.**"),
        (f"{theirs}layernorm_before.**", f"{ours}norm1.**"),
        (f"{theirs}layernorm_after.**", f"{ours}norm2.**"),
    ]


#: what --source may say: whose code trained or wrote a file
SOURCES = ("simmim", "fastmim", "mae", "timm", "hf")


@dataclass(frozen=True)
class Recognised:
    """Whose names these are.

    naming: how to read them.
    origins: the sources that write such names; more than one where networks and names are the same.
    """

    naming: Naming
    origins: tuple[str, ...]


def recognise(names: Collection[str]) -> Recognised:
    """Whose parameter names these are.

    Raises:
        WeightsError: nobody's that is known here.
    """

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    embedding = next((n for n in names if re.search(r"(^|\.)embeddings\.patch_embeddings\.", n)), None)
    if embedding is not None:
        prefix = embedding[: embedding.index("embeddings.patch")]
        stages = has(f"{prefix}encoder.layers.")
        trained = has(f"{prefix}embeddings.mask_token")
        if not prefix and stages:  # a bare encoder does not say its kind in the prefix
            raise WeightsError("a bare Swin encoder of Hugging Face, whose version its names do not say")
        return Recognised(
            huggingface(prefix, names), ("simmim",) if trained else ("simmim", "timm") if stages else ("hf",)
        )
    if has("encoder.patch_embed."):
        if has("decoder_pred.", "decoder_norm.", "mask_token"):
            return Recognised(FASTMIM_STAGES, ("fastmim",))
        if has("decoder.0.", "encoder.mask_token"):
            return Recognised(SIMMIM, ("simmim",))
    if has("patch_embed."):
        return recognise_plain(names)
    raise WeightsError(
        f"its names are of no implementation known here ({', '.join(sorted(names)[:3])}, ...); "
        "known: SimMIM, FastMIM, MAE, timm, Hugging Face"
    )


def recognise_plain(names: Collection[str]) -> Recognised:
    """Names without a prefix: MAE, and classifiers of every source but Hugging Face."""
    merging = {name.split(".")[1] for name in names if re.match(r"layers\.\d+\.downsample\.", name)}

    def has(expression: str) -> bool:
        return any(re.match(expression, name) for name in names)

    if has(r"decoder_pred\."):
        return Recognised(MAE, ("mae",)) if has("decoder_pos_embed") else Recognised(FASTMIM_BLOCKS, ("fastmim",))
    if has(r"layers\."):
        if has(r"head\.fc\.") or (merging and "0" not in merging):
            return Recognised(TIMM_STAGES, ("timm",))
        return Recognised(FASTMIM_POOLED, ("fastmim",)) if has(r"fc_norm\.") else Recognised(PLAIN, ("simmim", "timm"))
    if has(r"blocks_token_only\."):
        return Recognised(PLAIN, ("timm",))
    if has(r"blocks\.\d+\.ls1\."):
        return Recognised(TIMM_BLOCKS, ("timm",))
    if has(r"blocks\.\d+\.attn\.(relative_position_bias_table|q_bias)"):
        return Recognised(PLAIN, ("simmim",))
    return Recognised(PLAIN, ("fastmim", "mae", "timm") if has(r"fc_norm\.") else ("timm", "simmim", "fastmim", "mae"))


def naming_for(source: str, names: Collection[str]) -> Naming:
    """How a source names a network of ours with these parameters."""
    pretraining = any(name.startswith("decoder.") for name in names)
    stages = any(name.startswith("encoder.layers.") for name in names)
    if source == "hf":
        v2 = any(".cpb_mlp." in name for name in names)
        return huggingface("swinv2." if v2 else "swin." if stages else "vit.")
    if source == "fastmim":
        if pretraining:
            return FASTMIM_STAGES if stages else FASTMIM_BLOCKS
        return FASTMIM_POOLED if stages else PLAIN
    layer_scale_apart = not any(name.startswith("encoder.blocks_token_only.") for name in names)
    timm = TIMM_STAGES if stages else TIMM_BLOCKS if layer_scale_apart else PLAIN
    return {"simmim": SIMMIM if pretraining else PLAIN, "timm": timm, "mae": MAE if pretraining else PLAIN}[source]
