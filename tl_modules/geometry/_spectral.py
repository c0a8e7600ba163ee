"""Spectral clustering for several numbers of clusters from one set of eigenvectors.

Source: Ng, Jordan and Weiss, "On Spectral Clustering" (NIPS 2001), scaled by degree as Shi and Malik do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

_FEW_UNITS = 1000
"""Up to here all eigenvectors are computed at once, which is faster."""


def spectral_labels(
    affinity: Any, n_clusters: Sequence[int], random_state: int
) -> dict[int, Int[np.ndarray, " unit"]]:
    """Cluster a graph into each of several numbers of clusters.

    Args:
        affinity: symmetric weights of at least 0, dense or CSR; a dense matrix is overwritten.
        n_clusters: numbers of clusters, each below that of units.
        random_state: seed of the eigenvectors' start and of k-means.

    Returns:
        The label of each unit, for each number.

    Example:
        >>> blocks = np.kron(np.eye(2), np.ones((3, 3))) + 0.01
        >>> labels = spectral_labels(blocks, [2], 0)[2]
        >>> len(set(labels[:3])), len(set(labels))
        (1, 2)
    """
    from sklearn.cluster import KMeans

    places = _embedding(affinity, max(n_clusters), random_state)
    return {
        k: KMeans(k, n_init=10, random_state=random_state).fit(places[:, :k]).labels_.astype(np.int64)
        for k in n_clusters
    }


def _embedding(affinity: Any, n_components: int, random_state: int) -> Float[np.ndarray, "unit component"]:
    """Leading eigenvectors of D^-1 A, the largest first; the diagonal plays no part."""
    scale, normalised = _normalised(affinity)
    n_units = len(scale)
    if sparse.issparse(normalised) or n_units > _FEW_UNITS:
        from scipy.sparse.linalg import eigsh

        start = np.random.default_rng(random_state).uniform(-1, 1, n_units)
        values, vectors = eigsh(normalised, n_components, which="LA", v0=start)
    else:
        from scipy.linalg import eigh

        values, vectors = eigh(normalised, subset_by_index=(n_units - n_components, n_units - 1))
    return np.asarray(vectors[:, np.argsort(-values)] * scale[:, None])


def _normalised(affinity: Any) -> tuple[Float[np.ndarray, " unit"], Any]:
    if sparse.issparse(affinity):
        degree = np.asarray(affinity.sum(axis=1)).ravel() - affinity.diagonal()
        scale = _inverse_root(degree)
        graph = affinity - sparse.dia_array((affinity.diagonal()[None], [0]), shape=affinity.shape)
        by_scale = sparse.dia_array((scale[None], [0]), shape=affinity.shape)
        return scale, sparse.csr_array(by_scale @ graph @ by_scale)
    np.fill_diagonal(affinity, 0)
    scale = _inverse_root(affinity.sum(axis=1))
    affinity *= scale[:, None]
    affinity *= scale[None]
    return scale, affinity


def _inverse_root(degree: Float[np.ndarray, " unit"]) -> Float[np.ndarray, " unit"]:
    """1 where a unit has no neighbour."""
    return 1 / np.sqrt(np.where(degree > 0, degree, 1))
