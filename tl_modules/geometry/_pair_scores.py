"""How far pairs of one relation are alike: parallelograms, trapezoids, analogies, clusters of differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

Vectors = Float[np.ndarray, "pair dimension"]
MEASURES = ("parallelogram", "trapezoid", "analogy", "silhouette")
"""Of these, the first is an error: the lower, the better."""


def parallelogram_error(u: Any, v: Any) -> Float[np.ndarray, "*rows"]:
    """||u - v|| over the mean of ||u|| and ||v||, of differences [..., dimension]: 0 for a parallelogram.

    Example:
        >>> parallelogram_error([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]])
        array([0., 2.])
    """
    u, v = np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)
    lengths = np.linalg.norm(u, axis=-1) + np.linalg.norm(v, axis=-1)
    return np.asarray(2 * np.linalg.norm(u - v, axis=-1) / lengths)


def trapezoid_cosine(u: Any, v: Any) -> Float[np.ndarray, "*rows"]:
    """Cosine of differences [..., dimension]: 1 for a trapezoid, whatever the lengths.

    Example:
        >>> trapezoid_cosine([[1.0, 0.0]], [[3.0, 0.0]])
        array([1.])
    """
    u, v = np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)
    return np.asarray((u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1))


def pair_scores(first: Vectors, second: Vectors, pairs: pd.DataFrame) -> pd.DataFrame:
    """All measures of each relation, over its pairs of pairs.

    An analogy a : b :: c : ? is answered with the word, among all of `pairs` but a, b and c, whose vector
    is nearest to b - a + c; the pairs that share their answer with a cue are left out. All measures stay the
    same when all vectors are shifted or scaled.

    Args:
        first: of each pair.
        second: of each pair.
        pairs: columns relation, first and second.

    Returns:
        One row a relation: relation, n_pairs, parallelogram (mean error), trapezoid (mean cosine), analogy
        (share of right answers) and silhouette (of its differences among those of other relations, Euclidean;
        nan for a single relation).
    """
    differences = second - first
    silhouette = _silhouettes(differences, pairs["relation"].to_numpy(object))
    words, code = np.unique(pairs[["first", "second"]].to_numpy(str), return_inverse=True)
    numbers = code.reshape(-1, 2)
    vectors = np.empty((len(words), first.shape[1]))
    vectors[numbers[:, 0]], vectors[numbers[:, 1]] = first, second
    rows = []
    for relation, own in pairs.groupby("relation", sort=False).indices.items():
        i, j = np.triu_indices(len(own), 1)
        u, v = differences[own[i]], differences[own[j]]
        with np.errstate(invalid="ignore"):
            scores = {"parallelogram": parallelogram_error(u, v), "trapezoid": trapezoid_cosine(u, v)}
        right = _answers(differences[own], vectors, numbers[own])
        scores |= {"analogy": right, "silhouette": silhouette[own]}
        means = {name: _mean(values) for name, values in scores.items()}
        rows.append({"relation": relation, "n_pairs": len(own), **means})
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    """Over those that are defined."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _answers(
    differences: Vectors, vectors: Float[np.ndarray, "word dimension"], numbers: Int[np.ndarray, "pair two"]
) -> Float[np.ndarray, " analogy"]:
    """For each ordered pair of pairs 1 or 0, nan where the answer is a cue."""
    squares = (vectors**2).sum(1)
    shift, start = differences @ vectors.T, vectors[numbers[:, 0]] @ vectors.T
    right = []
    for given, (a, b) in enumerate(numbers):
        distance = squares - 2 * (shift[given] + start)
        distance[:, [a, b]] = np.inf
        distance[np.arange(len(numbers)), numbers[:, 0]] = np.inf
        answers = (distance.argmin(1) == numbers[:, 1]).astype(float)
        answers[np.isin(numbers[:, 1], (a, b))] = np.nan
        right.append(np.delete(answers, given))
    return np.concatenate(right)


def _silhouettes(differences: Vectors, labels: np.ndarray) -> Float[np.ndarray, " pair"]:
    from sklearn.metrics import silhouette_samples

    n_relations = len(pd.unique(labels))
    if not 1 < n_relations < len(labels):
        return np.full(len(labels), np.nan)
    return np.asarray(silhouette_samples(differences, labels.astype(str)), dtype=np.float64)


def silhouette(differences: Vectors, labels: np.ndarray) -> float:
    """Mean over all pairs, Euclidean.

    Example:
        >>> silhouette(np.array([[0.0], [0.0], [9.0], [9.0]]), np.array(["a", "a", "b", "b"]))
        1.0
    """
    return _mean(_silhouettes(differences, labels))


def shuffled_seconds(pairs: pd.DataFrame, rng: np.random.Generator) -> Int[np.ndarray, " pair"]:
    """Which pair's second word each first word gets: another one's of its relation, none its own."""
    order = np.arange(len(pairs))
    for own in pairs.groupby("relation", sort=False).indices.values():
        ring = rng.permutation(own)
        order[ring] = np.roll(ring, 1)
    return order
