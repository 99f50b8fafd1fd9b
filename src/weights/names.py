"""Parameter names of the reference implementations, and ours.

Ours follow the references wherever a name is free to choose, so the table is short: encoder parameters stand below
`encoder.`, and the decoder's below `decoder.`.
"""

from __future__ import annotations

#: reference prefix -> ours, FastMIM (mim_vit_pretrain.py, models_vit.py)
FASTMIM = {
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
    "mask_token": "mask_token",
    "fc_norm.": "fc_norm.",
    "head.": "head.",
    "encoder.": "encoder.",
}


#: reference prefix -> ours, SimMIM (models/simmim.py and its encoders, Swin V2 too)
SIMMIM = {
    "decoder.0.": "decoder.pred.",
    "encoder.mask_token": "mask_token",
    "fc_norm.": "fc_norm.",
    "head.": "head.",
    "encoder.": "encoder.",
}


def from_simmim(name: str) -> str:
    """Our name of a parameter of SimMIM's pre-training and fine-tuning networks."""
    return _renamed(name, SIMMIM)


def from_fastmim_swin(name: str) -> str:
    """FastMIM's Swin fine-tuning network calls its final norm fc_norm, and applies it before pooling."""
    return f"encoder.norm.{name.removeprefix('fc_norm.')}" if name.startswith("fc_norm.") else from_fastmim(name)


def from_fastmim(name: str) -> str:
    """Our name of a parameter of FastMIM's pre-training and fine-tuning networks."""
    return _renamed(name, FASTMIM)


def _renamed(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"encoder.{name}"
