"""Masked image modelling on all tokens: one Method for every encoder, mask, target and decoder."""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from ..config import MIMConfig
from ..models import Encoder
from ..models.layers import parameter
from .decoders import build_decoder
from .masked import MaskedModel
from .masking import resize_mask


class MaskedImageModel(MaskedModel):
    """Replace hidden parts by the mask token, encode all tokens, predict the target.

    FastMIM (mim_vit_pretrain.py): a learned colour replaces hidden pixels before the patch embedding; a transformer
    decoder predicts HOG or pixels; mean squared error over hidden tokens. SimMIM (models/simmim.py): a learned vector
    replaces hidden tokens after the patch embedding; one linear layer predicts pixels; mean absolute error over hidden
    pixels.

    Args:
        encoder, image_size, teacher: as in `MaskedModel`.
        config: mask, corruption, target, decoder and loss.
    """

    def __init__(
        self, encoder: Encoder, config: MIMConfig, image_size: tuple[int, int], teacher: nn.Cell | None = None
    ):
        super().__init__(encoder, config, image_size, teacher)
        self.masks_tokens = config.corrupt == "token"
        shape = (1, 1, encoder.embed_dim) if self.masks_tokens else (1, encoder.in_chans, 1, 1)
        self.mask_token = parameter(Normal(0.02), *shape)
        num_prefix, dim = encoder.num_prefix_tokens, self.target.dim
        self.decoder = build_decoder(config.decoder, encoder.out_dim, dim, num_prefix, encoder.norm_eps)

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.decoder(self.encode(image, mask))

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """Encoder output of images with the blocks of the mask hidden."""
        if not self.masks_tokens:
            return self.encoder(self.hide(image, mask))
        tokens = self.encoder.embed(image)
        batch, count, dim = tokens.shape
        grid = (self.image_size[0] // self.encoder.patch_size, self.image_size[1] // self.encoder.patch_size)
        hidden = ops.tile(resize_mask(mask, grid).reshape(batch, count, 1), (1, 1, dim))
        token = ops.tile(self.mask_token, (batch, count, 1))
        return self.encoder.encode(tokens * (1.0 - hidden) + token * hidden)

    def hide(self, image: Tensor, mask: Tensor) -> Tensor:
        """The images with the mask token's colour on hidden blocks."""
        batch, chans, height, width = image.shape
        pixels = ops.tile(resize_mask(mask, self.image_size).expand_dims(1), (1, chans, 1, 1))
        colour = ops.tile(self.mask_token, (batch, 1, height, width))
        return image * (1.0 - pixels) + colour * pixels
