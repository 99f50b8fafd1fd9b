"""The contract every encoder keeps, so that methods, optimiser and weight loading never ask which one it is."""

from __future__ import annotations

from mindspore import Tensor, nn


class Encoder(nn.Cell):
    """Image to tokens; knows nothing of masks, heads and losses.

    Attributes set by every encoder:
        embed_dim: width of a token of `embed`.
        out_dim: width of an output token.
        stride: pixels per side of one output token.
        patch_size: pixels per side of one input patch (of `embed`).
        num_prefix_tokens: tokens before the patch tokens in the output (class token).
        num_layers: number of learning-rate layers, `layer_of` + 1 at most.
        in_chans: channels of the input image.
        norm_eps: epsilon of its norms, taken over by heads and decoders.
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
        """(B, in_chans, H, W) -> patch tokens (B, N, C), before class token and position."""
        raise NotImplementedError

    def outputs(
        self, tokens: Tensor, indices: tuple[int, ...], keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `encode` and `blocks_of` give, from one pass: patch tokens -> the sequence, and those of the blocks."""
        raise NotImplementedError

    def encode(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch tokens of `embed` -> (B, num_prefix_tokens + N', out_dim), final norm applied.

        Args:
            tokens: (B, N, embed_dim).
            keep: indices (B, K) int32 of each image's visible tokens, which alone go through the blocks, with their
                positions and in this order; then N' is K. None keeps all.

        Raises:
            ValueError: the encoder needs all tokens (`drops_tokens` of its configuration).
        """
        return self.outputs(tokens, (), keep)[0]

    def construct(self, image: Tensor) -> Tensor:
        return self.encode(self.embed(image))

    def pooled(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the mean of the patch tokens (B, out_dim)."""
        return self.construct(image)[:, self.num_prefix_tokens :].mean(axis=1)

    def blocks_of(self, tokens: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The sequences after the blocks of those numbers, each once and in ascending order, before the final norm.

        The patch tokens are the last of a sequence. Tokens before them may be fewer than in `encode`'s output, where
        a class token joins behind these blocks: their number is the length less the patch tokens.
        """
        return self.outputs(tokens, indices)[1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of output tokens for an image of (height, width) pixels."""
        return -(-image_size[0] // self.stride), -(-image_size[1] // self.stride)

    def layer_of(self, name: str) -> int:
        """Learning-rate layer of a parameter (name below the encoder): 0 the embedding, num_layers - 1 the top."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names (relative to the encoder) of tokens and tables that fine-tuning does not decay."""
        raise NotImplementedError
