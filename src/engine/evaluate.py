"""Metrics of a Method over a data set, and the k-NN probe of frozen features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from . import parallel
from .graph import AsGraph


def evaluate(measure: AsGraph, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Every image of all ranks once: the Method's metrics as means, and `count`."""
    method: Any = measure.cell
    was_training = method.training
    measure.set_train(False)
    totals = np.zeros(len(method.metrics) + 1)
    for image, label in batches:
        totals += [float(value) for value in measure(image, label)]
    measure.set_train(was_training)
    totals = parallel.total(totals)
    means = totals[1:] / max(totals[0], 1)
    return {**dict(zip(method.metrics, means.tolist(), strict=True)), "count": int(totals[0])}


def features(cell: nn.Cell, batches: Iterable[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Features (n, dim) of the images with label >= 0, in order."""
    was_training = cell.training
    cell.set_train(False)
    rows = []
    for image, label in batches:
        keep = label.asnumpy() >= 0
        rows.append(cell(image).asnumpy()[keep])
    cell.set_train(was_training)
    return np.concatenate(rows)


def knn_accuracy(
    bank: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    k: int,
    temperature: float = 0.07,
) -> float:
    """Top-1 of weighted k-NN by cosine similarity, weights exp(similarity / temperature) (Wu et al. 2018, DINO).

    Args:
        bank, query: features (n, dim) and labels (n,).
        k: neighbours.
    """
    train, test = _unit(bank[0]), _unit(query[0])
    classes = int(bank[1].max()) + 1
    hits = 0
    for start in range(0, len(test), 1024):
        similarity = test[start : start + 1024] @ train.T
        nearest = np.argpartition(-similarity, min(k, len(train)) - 1, axis=1)[:, :k]
        votes = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
        scores = np.zeros((len(votes), classes))
        for column in range(votes.shape[1]):
            scores[np.arange(len(votes)), bank[1][nearest[:, column]]] += votes[:, column]
        hits += int((scores.argmax(axis=1) == query[1][start : start + 1024]).sum())
    return hits / len(test)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
