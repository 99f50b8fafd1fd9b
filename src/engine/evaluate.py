"""Metrics of a Method over a data set, and the k-NN probe of frozen features."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from mindspore import Tensor, nn

from . import parallel


def evaluate(measure: nn.Cell, batches: Iterable[tuple[Tensor, ...]]) -> np.ndarray:
    """Sum a Method's `measure` over all images of all ranks; the Method stays in evaluation mode.

    Args:
        measure: the function `measure` as a graph.
        batches: images, labels and numbers.

    Returns:
        The sums, (n,) float64.
    """
    measure.set_train(False)
    totals: np.ndarray = np.zeros(0)
    for batch in batches:
        sums = measure(*batch).asnumpy().astype(np.float64)
        totals = sums if not totals.size else totals + sums
    size = int(parallel.largest(totals.size))
    return parallel.total(totals if totals.size else np.zeros(size))  # a rank without a batch adds zeros


def features(cell: nn.Cell, batches: Iterable[tuple[Tensor, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Compute features of the images with label >= 0; the cell stays in evaluation mode.

    Args:
        cell: images -> (B, dim).
        batches: images, labels and numbers.

    Returns:
        Image numbers (n,) and features (n, dim).
    """
    cell.set_train(False)
    numbers, outputs = [], []
    for image, label, number in batches:
        keep = label.asnumpy() >= 0
        numbers.append(number.asnumpy()[keep])
        outputs.append(cell(image).asnumpy()[keep])
    return np.concatenate(numbers), np.concatenate(outputs)


def knn_accuracy(
    bank: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    k: int,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy of weighted k-NN: cosine similarity, weights exp(similarity / temperature) (Wu et al. 2018, DINO).

    Args:
        bank, query: features (n, dim) and labels (n,).
        k: number of neighbours.
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


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts of images (classes, classes): row = true class, column = predicted class."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale the vectors (n, dim) to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
