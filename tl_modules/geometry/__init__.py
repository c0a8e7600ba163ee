"""Geometry of write directions: crystals, lobes and galaxies, with nulls, next to the modules.

Source: Li et al. 2024, "The Geometry of Concepts" (arXiv 2410.19750). Names are loaded on first touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_modules._lazy import load

if TYPE_CHECKING:
    from tl_modules.geometry.affinities import (
        affinity,
        affinity_from_counts,
        geometric,
        geometric_neighbours,
        neighbours,
    )
    from tl_modules.geometry.beside_modules import compare_with_modules
    from tl_modules.geometry.clusters import Lobes, lobes
    from tl_modules.geometry.compact import compactness, compactness_by_group, probe
    from tl_modules.geometry.counting import Cooccurrence, cooccurrence, count_blocks
    from tl_modules.geometry.crystals import Crystals, crystal_scores, crystal_table
    from tl_modules.geometry.distractors import Distractors, fit_distractors
    from tl_modules.geometry.entropies import ClusteringEntropy, clustering_entropy, knn_entropy
    from tl_modules.geometry.galaxies import Galaxy, fit_power_law, galaxy, marchenko_pastur
    from tl_modules.geometry.lobe_tables import LobeTable, lobe_table
    from tl_modules.geometry.pair_vectors import PairVectors, feature_differences, pair_differences
    from tl_modules.geometry.quadruplets import Quadruplets, find_quadruplets
    from tl_modules.geometry.thresholds import Quantile
    from tl_modules.geometry.word_pairs import held_out, load_word_pairs

_ROOM_OF = {
    "ClusteringEntropy": "entropies",
    "Cooccurrence": "counting",
    "Crystals": "crystals",
    "Distractors": "distractors",
    "Galaxy": "galaxies",
    "LobeTable": "lobe_tables",
    "Lobes": "clusters",
    "PairVectors": "pair_vectors",
    "Quadruplets": "quadruplets",
    "Quantile": "thresholds",
    "affinity": "affinities",
    "affinity_from_counts": "affinities",
    "clustering_entropy": "entropies",
    "compactness": "compact",
    "compactness_by_group": "compact",
    "compare_with_modules": "beside_modules",
    "cooccurrence": "counting",
    "count_blocks": "counting",
    "crystal_scores": "crystals",
    "crystal_table": "crystals",
    "feature_differences": "pair_vectors",
    "find_quadruplets": "quadruplets",
    "fit_distractors": "distractors",
    "fit_power_law": "galaxies",
    "galaxy": "galaxies",
    "geometric": "affinities",
    "geometric_neighbours": "affinities",
    "held_out": "word_pairs",
    "knn_entropy": "entropies",
    "load_word_pairs": "word_pairs",
    "lobe_table": "lobe_tables",
    "lobes": "clusters",
    "marchenko_pastur": "galaxies",
    "neighbours": "affinities",
    "pair_differences": "pair_vectors",
    "probe": "compact",
}

__all__ = [
    "ClusteringEntropy",
    "Cooccurrence",
    "Crystals",
    "Distractors",
    "Galaxy",
    "LobeTable",
    "Lobes",
    "PairVectors",
    "Quadruplets",
    "Quantile",
    "affinity",
    "affinity_from_counts",
    "clustering_entropy",
    "compactness",
    "compactness_by_group",
    "compare_with_modules",
    "cooccurrence",
    "count_blocks",
    "crystal_scores",
    "crystal_table",
    "feature_differences",
    "find_quadruplets",
    "fit_distractors",
    "fit_power_law",
    "galaxy",
    "geometric",
    "geometric_neighbours",
    "held_out",
    "knn_entropy",
    "load_word_pairs",
    "lobe_table",
    "lobes",
    "marchenko_pastur",
    "neighbours",
    "pair_differences",
    "probe",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _ROOM_OF, name)


def __dir__() -> list[str]:
    return sorted(__all__)
