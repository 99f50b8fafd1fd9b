"""Operations of transformer blocks, and the values they keep for the gradient, as pure functions of their sizes.

Operations are counted as mmengine and fvcore count them, whose figures the model tables print: one multiply-add is one
FLOP. For N rows of C channels, T tokens that attend to one another:

    linear layer, convolution      N * C_in * C_out (a patch projection: C_in = channels * patch**2)
    attention                      4 * N * C**2 for q, k, v and the projection, 2 * N * T * C for scores and mixing
    MLP                            2 * mlp_ratio * N * C**2
    talking heads, of H heads      2 * N * T * H**2 besides
    norm                           5 * N * C
    pooling                        N * C

Windows that do not divide a map are padded, and padded tokens are projected and attended like others. Not counted, as
there: activations, softmax, additions, position biases (tables and networks of positions are worked out once per batch,
not per image). Not counted either: the target of masked image modelling and its loss.

Check (tests/test_plan.py): mmpretrain's model tables, to the last digit. Their figure of a pre-training network is the
encoder's alone at 224 pixels, whatever the recipe trains at; that of a classifier leaves its head out.
"""

from __future__ import annotations

from dataclasses import dataclass

NORM = 5  # operations per value


@dataclass(frozen=True)
class BlockGroup:
    """Equal transformer blocks.

    Attributes:
        depth: blocks.
        rows: tokens of an image.
        attending: those in attention, more than `rows` where windows are padded.
        together: tokens that attend to one another.
        dim, heads, mlp_ratio: sizes.
        talking: whether linear layers mix the heads before and after the softmax.
    """

    depth: int
    rows: int
    attending: int
    together: int
    dim: int
    heads: int
    mlp_ratio: float
    talking: bool = False

    def flops(self) -> int:
        """Multiply-adds of all blocks."""
        attention = 4 * self.attending * self.dim**2 + 2 * self.attending * self.together * self.dim
        attention += 2 * self.attending * self.together * self.heads**2 * self.talking
        mlp = 2 * self.rows * self.dim * int(self.dim * self.mlp_ratio)
        return self.depth * (attention + mlp + 2 * NORM * self.rows * self.dim)

    def kept_values(self) -> int:
        """Values for the gradient: norms, q, k, v, scaled q, mixture, sums, scores and their softmax, MLP inside.

        For N rows of C channels with H heads a block keeps N * (9 C + 2 * mlp_ratio * C), and 2 * N * T * H for the
        scores before and after the softmax, twice that with talking heads.
        """
        rows = 9 * self.dim + 2 * int(self.dim * self.mlp_ratio)
        scores = self.attending * self.together * self.heads
        return self.depth * (self.rows * rows + (4 if self.talking else 2) * scores)
