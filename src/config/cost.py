"""FLOPs of transformer blocks and the values they save for the backward pass, as pure functions of their sizes.

FLOPs are counted as mmengine and fvcore do, since model tables print those figures: one multiply-add is one FLOP.
For N tokens of C channels, each attending to T tokens:

    linear layer, convolution      N * C_in * C_out (a patch projection: C_in = channels * patch**2)
    attention                      4 * N * C**2 for q, k, v and the projection, 2 * N * T * C for scores and mixing
    MLP                            2 * mlp_ratio * N * C**2
    talking heads, of H heads      2 * N * T * H**2 more
    norm                           5 * N * C
    pooling                        N * C

A map that is not a multiple of the window is padded; padded tokens are projected and attended like others. As in
mmengine and fvcore, these are not counted: activation functions, softmax, additions, position biases (computed once
per batch, not per image). The target of masked image modelling and its loss are not counted either.

Check (tests/test_plan.py): mmpretrain's model tables, to the last digit. For a pre-training network those tables count
the encoder alone at 224 pixels, whatever the training size; for a classifier they leave the head out.
"""

from __future__ import annotations

from dataclasses import dataclass

NORM = 5  # operations per value


@dataclass(frozen=True)
class BlockGroup:
    """Transformer blocks of equal sizes.

    Attributes:
        depth: number of blocks.
        tokens: tokens of an image.
        padded_tokens: tokens in attention; more than `tokens` where windows are padded.
        window_tokens: tokens that each token attends to.
        dim, heads, mlp_ratio: sizes.
        talking: whether linear layers mix the heads before and after the softmax.
    """

    depth: int
    tokens: int
    padded_tokens: int
    window_tokens: int
    dim: int
    heads: int
    mlp_ratio: float
    talking: bool = False

    def flops(self) -> int:
        """Multiply-adds of all blocks for one image."""
        attention = 4 * self.padded_tokens * self.dim**2 + 2 * self.padded_tokens * self.window_tokens * self.dim
        attention += 2 * self.padded_tokens * self.window_tokens * self.heads**2 * self.talking
        mlp = 2 * self.tokens * self.dim * int(self.dim * self.mlp_ratio)
        return self.depth * (attention + mlp + 2 * NORM * self.tokens * self.dim)

    def saved_values(self) -> int:
        """Values that the backward pass needs: norms, q, k, v, scaled q, attention output, residual sums, scores
        before and after the softmax, hidden layer of the MLP.

        For N tokens of C channels with H heads a block saves N * (9 C + 2 * mlp_ratio * C), and 2 * N * T * H for the
        scores before and after the softmax; with talking heads the scores count twice.
        """
        per_token = 9 * self.dim + 2 * int(self.dim * self.mlp_ratio)
        scores = self.padded_tokens * self.window_tokens * self.heads
        return self.depth * (self.tokens * per_token + (4 if self.talking else 2) * scores)
