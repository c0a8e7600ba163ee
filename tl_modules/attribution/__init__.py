"""Attribution: how much each source adds to a target; every method gives the same long table.

Names are loaded on first touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_modules._lazy import load

if TYPE_CHECKING:
    from tl_modules.attribution.gradient import gradient_attribution, gradient_scores
    from tl_modules.attribution.graph import LocalGraph
    from tl_modules.attribution.head_sources import head_source_attribution, head_source_scores
    from tl_modules.attribution.logit import direct_logit_attribution, direct_logit_scores, logit_table
    from tl_modules.attribution.logprob import logprob_increase, logprob_scores
    from tl_modules.attribution.paths import path_search
    from tl_modules.attribution.promotes import promoted_tokens
    from tl_modules.attribution.queries import query_layers, query_neurons
    from tl_modules.attribution.rankings import neuron_rankings, zero_top_evaluation
    from tl_modules.attribution.replacement import local_graph
    from tl_modules.attribution.scores import Scores
    from tl_modules.attribution.transcoders import (
        deembed,
        feature_edges,
        norm_pullback,
        ov_importance,
        ov_pullback,
        pullback,
    )

_ROOM_OF = {
    "LocalGraph": "graph",
    "Scores": "scores",
    "deembed": "transcoders",
    "direct_logit_attribution": "logit",
    "direct_logit_scores": "logit",
    "feature_edges": "transcoders",
    "gradient_attribution": "gradient",
    "gradient_scores": "gradient",
    "head_source_attribution": "head_sources",
    "head_source_scores": "head_sources",
    "local_graph": "replacement",
    "logit_table": "logit",
    "logprob_increase": "logprob",
    "logprob_scores": "logprob",
    "neuron_rankings": "rankings",
    "norm_pullback": "transcoders",
    "ov_importance": "transcoders",
    "ov_pullback": "transcoders",
    "path_search": "paths",
    "promoted_tokens": "promotes",
    "pullback": "transcoders",
    "query_layers": "queries",
    "query_neurons": "queries",
    "zero_top_evaluation": "rankings",
}

__all__ = [
    "LocalGraph",
    "Scores",
    "deembed",
    "direct_logit_attribution",
    "direct_logit_scores",
    "feature_edges",
    "gradient_attribution",
    "gradient_scores",
    "head_source_attribution",
    "head_source_scores",
    "local_graph",
    "logit_table",
    "logprob_increase",
    "logprob_scores",
    "neuron_rankings",
    "norm_pullback",
    "ov_importance",
    "ov_pullback",
    "path_search",
    "promoted_tokens",
    "pullback",
    "query_layers",
    "query_neurons",
    "zero_top_evaluation",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _ROOM_OF, name)


def __dir__() -> list[str]:
    return sorted(__all__)
