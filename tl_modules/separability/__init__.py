"""Capability separability by selective pruning: importances, scores, the loop and the trade-off curve.

Source: Pochinkov and Schoots, "Dissecting Language Models: Machine Unlearning via Selective Pruning"
(arXiv 2403.01267).
"""

from tl_modules.separability.exam import METRICS
from tl_modules.separability.importance import Importances, importances
from tl_modules.separability.loop import both_directions, separate
from tl_modules.separability.metrics import area_ratio, auc_score, forget_drops, max_delta
from tl_modules.separability.prune import Pruning, random_masks
from tl_modules.separability.result import Separability
from tl_modules.separability.score import default_eps, scores, top_fraction

__all__ = [
    "METRICS",
    "Importances",
    "Pruning",
    "Separability",
    "area_ratio",
    "auc_score",
    "both_directions",
    "default_eps",
    "forget_drops",
    "importances",
    "max_delta",
    "random_masks",
    "scores",
    "separate",
    "top_fraction",
]
