"""The interface of all encoders; methods, optimiser and weight loading use nothing else of an encoder."""

from __future__ import annotations

from mindspore import Tensor, nn


class Encoder(nn.Cell):
    """Image to tokens, without masks, heads and losses.

    Attributes set by every encoder:
        embed_dim: width of a token of `embed`.
        out_dim: width of an output token.
        stride: pixels per side of one output token.
        patch_size: pixels per side of one input patch (of `embed`).
        num_prefix_tokens: tokens before the patch tokens in the output (class and distillation token).
        num_layers: number of learning-rate layers; `layer_of` is less than it.
        in_chans: channels of the input image.
        norm_eps: epsilon of its norms; heads and decoders use it too.
    """

    embed_dim: int
    out_dim: int
    stride: int
    patch_size: int
    num_prefix_tokens: int
    num_layers: int
    in_chans: int
    norm_eps: float

    def embed(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> patch tokens (B, N, embed_dim), without prefix tokens and positions."""
        raise NotImplementedError

    def outputs(
        self, tokens: Tensor, indices: tuple[int, ...], keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The results of `encode` and `blocks_of` from one forward pass."""
        raise NotImplementedError

    def encode(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch tokens of `embed` -> (B, num_prefix_tokens + N', out_dim), final norm applied.

        Args:
            tokens: (B, N, embed_dim).
            keep: indices (B, K) int32 of the visible tokens of each image. Only these, with their positions and in
                this order, go through the blocks; then N' is K. None means all tokens.

        Raises:
            ValueError: `keep` is given, but the encoder needs all tokens (`drops_tokens` of its configuration).
        """
        return self.outputs(tokens, (), keep)[0]

    def construct(self, image: Tensor) -> Tensor:
        return self.encode(self.embed(image))

    def pooled(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> mean of the patch tokens (B, out_dim)."""
        return self.construct(image)[:, self.num_prefix_tokens :].mean(axis=1)

    def blocks_of(self, tokens: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The sequences after some blocks, without the final norm.

        The patch tokens are at the end of each sequence. There can be fewer prefix tokens than in `encode`'s output:
        CaiT adds its class token after these blocks.

        Args:
            tokens: (B, N, embed_dim).
            indices: numbers of the blocks, ascending, each once.
        """
        return self.outputs(tokens, indices)[1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Output tokens along height and width for an image of (height, width) pixels."""
        return -(-image_size[0] // self.stride), -(-image_size[1] // self.stride)

    def layer_of(self, name: str) -> int:
        """Learning-rate layer of a parameter, by its name in the encoder: 0 the embedding, num_layers - 1 the top."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names, in the encoder, of the tokens and tables without weight decay in fine-tuning."""
        raise NotImplementedError
