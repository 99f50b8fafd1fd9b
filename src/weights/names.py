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


def from_fastmim(name: str) -> str:
    """Our name of a parameter of FastMIM's pre-training and fine-tuning networks."""
    for theirs, ours in FASTMIM.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"encoder.{name}"
