"""Can a unit's lobe be told from the direction it writes? Logistic regression, always scored held out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

N_FOLDS = 5

Directions = Float[np.ndarray, "unit d_model"]
Labels = Int[np.ndarray, " unit"]


def probe_accuracy(unit: Directions, labels: Labels, random_state: int) -> float:
    """Balanced accuracy of a multinomial logistic regression, pooled over stratified, shuffled folds.

    Coordinates have a variance of about 1 and classes the same weight. Lobes with fewer units than folds are
    left out.

    Args:
        unit: directions of length 1.
        labels: the lobe of each.
        random_state: seed of the folds.

    Returns:
        From 0 to 1; nan if fewer than 2 lobes are left.

    Example:
        >>> rows = np.repeat(np.eye(2), 10, axis=0)
        >>> probe_accuracy(rows, np.repeat([0, 1], 10), 0)
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    kept = np.bincount(labels)[labels] >= N_FOLDS
    if len(np.unique(labels[kept])) < 2:
        return float("nan")
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=random_state)
    regression = LogisticRegression(max_iter=1000, class_weight="balanced")
    X = unit[kept] * np.sqrt(unit.shape[1])
    return float(
        balanced_accuracy_score(labels[kept], cross_val_predict(regression, X, labels[kept], cv=folds))
    )


def probe_nulls(
    unit: Directions, labels: Labels, n_draws: int, random_state: int
) -> dict[str, Float[np.ndarray, " draw"]]:
    """The same for random directions and for directions permuted among the units.

    Example:
        >>> rows = np.repeat(np.eye(2), 10, axis=0)
        >>> sorted(probe_nulls(rows, np.repeat([0, 1], 10), 1, 0))
        ['probe, permuted', 'probe, random directions']
    """
    rng = np.random.default_rng(random_state)
    random, permuted = [], []
    for draw in range(n_draws):
        random.append(probe_accuracy(random_directions(unit.shape, rng), labels, draw))
        permuted.append(probe_accuracy(unit[rng.permutation(len(unit))], labels, draw))
    return {"probe, random directions": np.array(random), "probe, permuted": np.array(permuted)}


def random_directions(shape: tuple[int, ...], rng: np.random.Generator) -> Directions:
    """Gaussian rows of length 1."""
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
