"""Parameter names of the reference implementations, and ours.

Our names follow the references where possible: encoder parameters start with `encoder.`, decoder parameters with
`decoder.`. A `Naming` is a list of pairs (their template, our template) that translates in both directions; the first
pair that fits is used. In a template `*` stands for one part of a dotted name and `**` for the rest of the name. `#1`
after our template means that their parameter is the second third of ours (query, key and value in one matrix).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass

from . import WeightsError

#: our name of a parameter, and which third of it theirs is (None: all of it)
OurName = tuple[str, int | None]
#: names that every implementation computes again
BUFFERS = r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|position_ids|num_batches_tracked)"


@dataclass(frozen=True)
class Naming:
    """Translation between their names and ours.

    pairs: (their template, our template).
    unused: pattern of their names that our networks do not need.
    roll_first: whether their networks shift windows before they pad maps (`SwinConfig.roll_first`).
    """

    pairs: tuple[tuple[str, str], ...]
    unused: str = BUFFERS
    roll_first: bool = False

    def ours(self, name: str) -> OurName | None:
        """Our name for theirs; None if our networks do not use it.

        Raises:
            WeightsError: no pair fits.
        """
        if re.fullmatch(self.unused, name):
            return None
        for theirs, ours in self.pairs:
            whole, _, third = ours.partition("#")
            translated = translate(name, theirs, whole)
            if translated:
                return translated, int(third) if third else None
        raise WeightsError(f"{name} has no place in our networks")

    def theirs(self, name: str) -> list[tuple[str, int | None]]:
        """Their names for ours, in the order of the thirds.

        Raises:
            WeightsError: no pair fits.
        """
        names: list[tuple[str, int | None]] = []
        for theirs, ours in self.pairs:
            whole, _, third = ours.partition("#")
            translated = translate(name, whole, theirs)
            if translated and not third and not names:
                return [(translated, None)]
            if translated and third:
                names.append((translated, int(third)))
        if not names:
            raise WeightsError(f"{name} has no name there")
        return names


def translate(name: str, source: str, target: str) -> str:
    """`name`, which fits the template `source`, in the template `target`; empty if it does not fit."""
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


#: SimMIM in pre-training (models/simmim.py)
SIMMIM = Naming((("decoder.0.**", "decoder.pred.**"), ("encoder.mask_token", "mask_token"), *same("encoder.**")))
DECODER = tuple((f"decoder_{part}.**", f"decoder.{part}.**") for part in ("embed", "blocks", "norm", "pred"))
#: FastMIM in pre-training: Swin names start with `encoder.` (mim_swin_pretrain.py), ViT names do not
#: (mim_vit_pretrain.py)
FASTMIM_SWIN = Naming((*DECODER, *same("mask_token", "encoder.**")))
FASTMIM_VIT = Naming((*DECODER, *same("mask_token"), ("**", "encoder.**")))
#: MAE in pre-training (models_mae.py)
MAE = Naming((*DECODER, ("decoder_pos_embed", "decoder.pos_embed"), *same("mask_token"), ("**", "encoder.**")))
#: classifiers and bare encoders of timm 0.5.4, Swin-Transformer, SimMIM, MAE, DeiT and FastMIM's ViT
PLAIN = Naming((*same("head.**", "head_dist.**", "fc_norm.**"), ("**", "encoder.**")))
#: FastMIM's Swin classifier: its final norm, before pooling, has the name fc_norm (mim_swin_finetune.py)
FASTMIM_SWIN_CLASSIFIER = Naming((("fc_norm.**", "encoder.norm.**"), *same("head.**"), ("**", "encoder.**")))
#: timm since 0.9: patch merging is part of the next stage; head and layer scale are separate cells
TIMM_SWIN = Naming(
    (
        ("head.fc.**", "head.**"),
        *((f"layers.{n + 1}.downsample.**", f"encoder.layers.{n}.downsample.**") for n in range(9)),
        ("**", "encoder.**"),
    ),
    roll_first=True,
)
TIMM_VIT = Naming(
    (*((f"blocks.*.ls{n}.gamma", f"encoder.blocks.*.gamma_{n}") for n in (1, 2)), *PLAIN.pairs),
)


#: Hugging Face's names in a block: query, key, value, projection, both linear layers of the MLP
OLD_PARTS = (
    *("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
NEW_PARTS = (
    *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    *("mlp.fc1", "mlp.fc2"),
)


def huggingface(prefix: str, names: Collection[str] = ()) -> Naming:
    """Naming of Hugging Face's ViT, ViTMAE, Swin and Swin V2.

    Args:
        prefix: first part of the encoder's names, such as `vit.`; empty for a bare encoder.
        names: names in the file; the names of ViT blocks depend on the version of transformers.
    """

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    positions = "absolute_pos_embed" if "swin" in prefix else "pos_embed"
    new = has(f"{prefix}layers.")
    decoder = "decoder.decoder_encoder.layer.*." if has("decoder.decoder_encoder.") else "decoder.decoder_layers.*."
    pairs = [
        ("classifier.**", "head.**"),
        ("decoder.0.**", "decoder.pred.**"),
        *((f"decoder.decoder_{part}.**", f"decoder.{part}.**") for part in ("embed", "norm", "pred")),
        ("decoder.decoder_pos_embed", "decoder.pos_embed"),
        ("decoder.mask_token", "mask_token"),
        *block_pairs(decoder, "decoder.blocks.*.", NEW_PARTS if has("decoder.decoder_layers.0.mlp.") else OLD_PARTS),
    ]
    encoder = [
        ("embeddings.mask_token", "mask_token"),
        ("embeddings.cls_token", "encoder.cls_token"),
        ("embeddings.position_embeddings", f"encoder.{positions}"),
        ("embeddings.patch_embeddings.projection.**", "encoder.patch_embed.proj.**"),
        ("embeddings.norm.**", "encoder.patch_embed.norm.**"),
        ("layernorm.**", "encoder.norm.**"),
        ("encoder.layers.*.downsample.**", "encoder.layers.*.downsample.**"),
        *block_pairs("layers.*." if new else "encoder.layer.*.", "encoder.blocks.*.", NEW_PARTS if new else OLD_PARTS),
    ]
    block, ours = "encoder.layers.*.blocks.*.", "encoder.layers.*.blocks.*."
    attention = f"{block}attention.self."
    if "swinv2" in prefix:
        encoder += [(f"{attention}{part}.bias", f"{ours}attn.{part[0]}_bias") for part in ("query", "value")]
    encoder += [
        (f"{attention}continuous_position_bias_mlp.**", f"{ours}attn.cpb_mlp.**"),
        (f"{attention}relative_position_bias_table", f"{ours}attn.relative_position_bias_table"),
        (f"{attention}logit_scale", f"{ours}attn.logit_scale"),
        *block_pairs(block, ours, tuple(part.replace("attention.attention.", "attention.self.") for part in OLD_PARTS)),
    ]
    pairs += [(prefix + theirs, ours) for theirs, ours in encoder]
    return Naming(tuple(pairs), rf"({re.escape(prefix)})?pooler\..*|{BUFFERS}")


def block_pairs(theirs: str, ours: str, parts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs for the parameters of a block; `parts` in the order of `OLD_PARTS`."""
    query, key, value, projection, first, second = parts
    return [
        *((f"{theirs}{part}.**", f"{ours}attn.qkv.**#{third}") for third, part in enumerate((query, key, value))),
        (f"{theirs}{projection}.**", f"{ours}attn.proj.**"),
        (f"{theirs}{first}.**", f"{ours}mlp.fc1.**"),
        (f"{theirs}{second}.**", f"{ours}mlp.fc2.**"),
        (f"{theirs}layernorm_before.**", f"{ours}norm1.**"),
        (f"{theirs}layernorm_after.**", f"{ours}norm2.**"),
    ]


#: values of --source: the code that trained or wrote a file
SOURCES = ("simmim", "fastmim", "mae", "timm", "hf")


@dataclass(frozen=True)
class Recognised:
    """The naming of a file.

    naming: translates its names.
    sources: the `SOURCES` that write such names; several if their networks and names are the same.
    """

    naming: Naming
    sources: tuple[str, ...]


def recognise(names: Collection[str]) -> Recognised:
    """The naming that a file's parameter names follow.

    Raises:
        WeightsError: none of those known here.
    """

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    embedding = next((n for n in names if re.search(r"(^|\.)embeddings\.patch_embeddings\.", n)), None)
    if embedding is not None:
        prefix = embedding[: embedding.index("embeddings.patch")]
        hierarchical = has(f"{prefix}encoder.layers.")
        pretraining = has(f"{prefix}embeddings.mask_token")
        if not prefix and hierarchical:  # without a prefix Swin and Swin V2 look the same
            raise WeightsError("a bare Swin encoder of Hugging Face; its names fit both Swin and Swin V2")
        if pretraining:
            return Recognised(huggingface(prefix, names), ("simmim",))
        return Recognised(huggingface(prefix, names), ("simmim", "timm") if hierarchical else ("hf",))
    if has("encoder.patch_embed."):
        if has("decoder_pred.", "decoder_norm.", "mask_token"):
            return Recognised(FASTMIM_SWIN, ("fastmim",))
        if has("decoder.0.", "encoder.mask_token"):
            return Recognised(SIMMIM, ("simmim",))
    if has("patch_embed."):
        return recognise_plain(names)
    raise WeightsError(
        f"its names belong to no known implementation ({', '.join(sorted(names)[:3])}, ...); "
        "known: SimMIM, FastMIM, MAE, timm, Hugging Face"
    )


def recognise_plain(names: Collection[str]) -> Recognised:
    """The naming of encoder names without a prefix: MAE, and classifiers of every source but Hugging Face."""
    merging_stages = {name.split(".")[1] for name in names if re.match(r"layers\.\d+\.downsample\.", name)}

    def has(expression: str) -> bool:
        return any(re.match(expression, name) for name in names)

    if has(r"decoder_pred\."):
        return Recognised(MAE, ("mae",)) if has("decoder_pos_embed") else Recognised(FASTMIM_VIT, ("fastmim",))
    if has(r"layers\."):
        if has(r"head\.fc\.") or (merging_stages and "0" not in merging_stages):
            return Recognised(TIMM_SWIN, ("timm",))
        if has(r"fc_norm\."):
            return Recognised(FASTMIM_SWIN_CLASSIFIER, ("fastmim",))
        return Recognised(PLAIN, ("simmim", "timm"))
    if has(r"blocks_token_only\."):
        return Recognised(PLAIN, ("timm",))
    if has(r"blocks\.\d+\.ls1\."):
        return Recognised(TIMM_VIT, ("timm",))
    if has(r"blocks\.\d+\.attn\.(relative_position_bias_table|q_bias)"):
        return Recognised(PLAIN, ("simmim",))
    return Recognised(PLAIN, ("fastmim", "mae", "timm") if has(r"fc_norm\.") else ("timm", "simmim", "fastmim", "mae"))


def naming_for(source: str, names: Collection[str]) -> Naming:
    """The naming that a source uses for a network with these parameters of ours."""
    pretraining = any(name.startswith("decoder.") for name in names)
    hierarchical = any(name.startswith("encoder.layers.") for name in names)
    if source == "hf":
        v2 = any(".cpb_mlp." in name for name in names)
        return huggingface("swinv2." if v2 else "swin." if hierarchical else "vit.")
    if source == "fastmim":
        if pretraining:
            return FASTMIM_SWIN if hierarchical else FASTMIM_VIT
        return FASTMIM_SWIN_CLASSIFIER if hierarchical else PLAIN
    if source == "timm":
        cait = any(name.startswith("encoder.blocks_token_only.") for name in names)
        return TIMM_SWIN if hierarchical else PLAIN if cait else TIMM_VIT
    return {"simmim": SIMMIM if pretraining else PLAIN, "mae": MAE if pretraining else PLAIN}[source]
