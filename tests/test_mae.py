"""Masked autoencoder: an encoder on some of its tokens, mask tokens in the decoder, and what cannot be combined."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.config import CaiTConfig, MAEConfig, Recipe, TransformerDecoderConfig, ViTConfig
from src.config.files import ConfigError, load_recipe
from src.methods import build_method
from src.models import build_encoder
from src.models.graph import AsGraph
from src.models.tokens import PutTokens, TakeTokens
from tests.helpers import numbers

pytestmark = [pytest.mark.usefixtures("graph_mode"), pytest.mark.compiles]

KEEP = np.array([[5, 0, 11], [2, 15, 7]], np.int32)
ENCODERS: dict[str, Any] = {
    "class token": replace(ViTConfig.tiny(), depth=1, position="learned"),
    "no class token": replace(ViTConfig.tiny(), depth=1, class_token=False),
    "two tokens": replace(ViTConfig.tiny(), depth=1, distilled=True, position="learned"),
    "no positions": replace(ViTConfig.tiny(), depth=1, position="none"),
    "cait": replace(CaiTConfig.tiny(), depth=1),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_visible_tokens_keep_their_positions(kind: str) -> None:
    """Tokens that are moved together with their positions give the same, and those left out have no influence."""
    ms.set_seed(1)
    encoder = build_encoder(ENCODERS[kind]).set_train(False)
    encode = AsGraph(encoder, encoder.encode)
    tokens = numbers(0, 2, 16, 32)
    found = encode(Tensor(tokens), Tensor(KEEP)).asnumpy().copy()
    prefix = encoder.num_prefix_tokens
    assert found.shape == (2, prefix + 3, 32)
    other = tokens + 1.0
    np.put_along_axis(other, KEEP[..., None], np.take_along_axis(tokens, KEEP[..., None], 1), 1)
    np.testing.assert_array_equal(encode(Tensor(other), Tensor(KEEP)).asnumpy(), found)
    order = np.array([2, 0, 1])
    moved = encode(Tensor(tokens), Tensor(KEEP[:, order])).asnumpy()
    np.testing.assert_allclose(moved[:, prefix:], found[:, prefix:][:, order], atol=1e-5)
    # all tokens in their order are a pass without `keep`
    every = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    everything = encode(Tensor(tokens), Tensor(every)).asnumpy()
    plain = AsGraph(encoder, encoder.encode)(Tensor(tokens)).asnumpy()
    np.testing.assert_allclose(everything, plain, atol=1e-5)


class Moved(nn.Cell):
    """Tokens taken out and put back, and a sum of both whose gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.take, self.put = TakeTokens(), PutTokens()

    def construct(self, tokens: Tensor, keep: Tensor, first: Tensor, second: Tensor) -> Tensor:
        taken = self.take(tokens, keep)
        return (taken * first).sum() + (self.put(taken, keep, 16) * second).sum()


def test_moving_tokens_has_the_gradient_of_a_gather() -> None:
    tokens, first, second = numbers(0, 2, 16, 4), numbers(1, 2, 3, 4), numbers(2, 2, 16, 4)
    taken = np.take_along_axis(tokens, KEEP[..., None], 1)
    put = np.zeros_like(tokens)
    np.put_along_axis(put, KEEP[..., None], taken, 1)
    values = [Tensor(value) for value in (tokens, KEEP, first, second)]
    cell = Moved()
    assert float(cell(*values)) == pytest.approx(float((taken * first).sum() + (put * second).sum()), rel=1e-5)
    gradient = ops.GradOperation()(cell)(*values).asnumpy()
    expected = np.zeros_like(tokens)
    np.put_along_axis(expected, KEEP[..., None], first, 1)
    kept = np.zeros((2, 16, 1))
    np.put_along_axis(kept, KEEP[..., None], 1, 1)
    np.testing.assert_allclose(gradient, expected + kept * second, rtol=1e-6)


def test_the_mask_splits_the_tokens() -> None:
    """Blocks of 2 x 2 patches: each hidden patch is hidden, each visible one is encoded, once."""
    encoder = replace(ViTConfig.tiny(), patch_size=4)
    method: Any = build_method(
        Recipe(encoder=encoder, method=MAEConfig(mask_block=8, decoder=TransformerDecoderConfig(width=32)))
    )
    mask = method.mask.of_numbers(Tensor(np.arange(3, dtype=np.int32)))
    hidden, keep = (part.asnumpy() for part in AsGraph(method, method.split)(mask))
    np.testing.assert_array_equal(hidden.reshape(3, 8, 8), mask.asnumpy().repeat(2, 1).repeat(2, 2))
    for row, visible in zip(hidden, keep, strict=True):
        np.testing.assert_array_equal(np.sort(visible), np.flatnonzero(row == 0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("encoder: swin_tiny\nmethod: {name: mae, mask_block: 32}", "method.name: mae .*; write fastmim or simmim"),
        ("encoder: vit_base_simmim\nmethod: mae", "method.name: mae .*; write fastmim or simmim"),
        ("method: {name: mae, decoder: linear}", "method.decoder.name: linear has no blocks for mask tokens"),
        ("method: {name: mae, mask_block: 8}", "legal: 16, 32, 112"),
        ("method: {name: mae, decoder: {depth: 0, width: 768}}", "method.decoder.depth: 0 .*; write 1"),
        ("method: {name: mae, decoder: {num_heads: 7}}", "method.decoder.num_heads: 7 does not divide width 512"),
        ("method: {name: mae, corrupt: token}", "method.corrupt: unknown key of MAEConfig"),
        (
            "method: {target: {name: features, teacher_encoder: {patch_size: 32}}}",
            "7x7 tokens, .* 14x14; write a teacher",
        ),
        ("encoder: {image_size: 96}\nmethod: {target: features}", "teacher_encoder.image_size: 224x224, but"),
    ],
)
def test_what_does_not_go_together(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)


def test_an_encoder_that_needs_all_tokens_says_so() -> None:
    from src.config import SwinConfig

    for config in (SwinConfig.tiny(), replace(ViTConfig.tiny(), relative_position="block", position="none")):
        encoder = build_encoder(config)
        assert not config.drops_tokens
        with pytest.raises(ValueError, match="all tokens"):
            encoder.encode(encoder.embed(Tensor(numbers(0, 2, 3, 32, 32))), Tensor(KEEP))
