"""A circuit as a networkx graph, pruned, and as a file for circuit-tracer's and Neuronpedia's viewers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_modules.attribution.graph_json import graph_document, write_graph
from tl_modules.attribution.pruning import completeness_score, prune, replacement_score
from tl_modules.circuits.edges import Edges, Wanted, edges_of
from tl_modules.circuits.points import Place

if TYPE_CHECKING:
    import networkx as nx

    from tl_modules.circuits.view import CircuitView

_KINDS = {"embedding": "embedding", "error": "error", "target": "logit"}
"""What pruning calls our kinds; all others are features to it."""


def to_networkx(nodes: pd.DataFrame, edges: pd.DataFrame) -> nx.DiGraph:
    """Nodes by id with all columns as attributes, edges with their score as `weight` too."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from((row["id"], row) for row in nodes.to_dict("records"))
    for row in edges.to_dict("records"):
        graph.add_edge(row["source"], row["target"], weight=row["score"], score=row["score"])
    return graph


def adjacency(nodes: pd.DataFrame, edges: pd.DataFrame) -> Float[Tensor, "node node"]:
    """Rows are targets, columns sources."""
    place = pd.Series(np.arange(len(nodes)), index=nodes["id"])
    table = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    rows, columns = place[edges["target"]].to_numpy(), place[edges["source"]].to_numpy()
    table[torch.as_tensor(rows), torch.as_tensor(columns)] = torch.as_tensor(edges["score"].to_numpy())
    return table


def pruned(
    nodes: pd.DataFrame, edges: pd.DataFrame, node_threshold: float, edge_threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The nodes and edges that carry most of the influence on the target; see `prune`."""
    table, weights, kinds = _as_graph(nodes, edges)
    kept = prune(table, weights, kinds, node_threshold=node_threshold, edge_threshold=edge_threshold)
    place = pd.Series(np.arange(len(nodes)), index=nodes["id"])
    own = kept.edges[
        torch.as_tensor(place[edges["target"]].to_numpy()), torch.as_tensor(place[edges["source"]].to_numpy())
    ].numpy()
    return nodes[kept.nodes.numpy()].reset_index(drop=True), edges[own].reset_index(drop=True)


def graph_scores(nodes: pd.DataFrame, edges: pd.DataFrame) -> dict[str, float]:
    """How much of the influence comes from tokens rather than from errors; see `replacement_score`."""
    table, weights, kinds = _as_graph(nodes, edges)
    return {
        "replacement": replacement_score(table, weights, kinds),
        "completeness": completeness_score(table, weights, kinds),
        "completeness_of_nodes": completeness_score(table, weights, kinds, sources=False),
    }


def _as_graph(
    nodes: pd.DataFrame, edges: pd.DataFrame
) -> tuple[Float[Tensor, "node node"], Float[Tensor, " node"], list[str]]:
    weights = torch.as_tensor((nodes["kind"] == "target").to_numpy(dtype=np.float64))
    return adjacency(nodes, edges), weights, [_KINDS.get(kind, "feature") for kind in nodes["kind"]]


def write_json(
    view: CircuitView,
    path: str | Path,
    *,
    slug: str,
    scan: str,
    n_units: int,
    node_threshold: float,
    edge_threshold: float,
    old_error_ids: bool,
) -> Path:
    """The graph of a view unit by unit, with modules as supernodes; see `CircuitView.to_json`."""
    nodes, edges = unit_graph(view, n_units)
    rows = nodes.assign(id=np.arange(len(nodes)))
    table, weights, kinds = _as_graph(rows.assign(kind=rows["kind"].replace({"logit": "target"})), edges)
    kept = prune(table, weights, kinds, node_threshold=node_threshold, edge_threshold=edge_threshold)
    chosen = np.flatnonzero(kept.nodes.numpy())
    new = {int(old): place for place, old in enumerate(chosen)}
    inside = [(new[t], new[s]) for t, s in kept.edges.nonzero().tolist() if t in new and s in new]
    drawn = rows.iloc[chosen].assign(influence=kept.share.numpy()[chosen]).reset_index(drop=True)
    links = pd.DataFrame(
        {
            "source_node": [s for _, s in inside],
            "target_node": [t for t, _ in inside],
            "score": [float(table[chosen[t], chosen[s]]) for t, s in inside],
        }
    )
    groups = {
        f"{module} {name}": drawn.index[drawn["module"] == module].tolist()
        for module, name in enumerate(view.plan.names)
        if (drawn["module"] == module).any()
    }
    document = graph_document(
        drawn,
        links,
        slug=slug,
        scan=scan or str(getattr(view.asked.model.cfg, "model_name", "custom")),
        prompt=view.one_prompt(),
        prompt_tokens=view.tokens,
        n_layers=view.plan.n_layers,
        node_threshold=node_threshold,
        supernodes=groups,
        old_error_ids=old_error_ids,
    )
    return write_graph(path, document)


def unit_graph(view: CircuitView, n_units: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The units that matter most as nodes of their own, with heads, tokens and the target, for one prompt.

    Returns:
        Nodes with kind, layer, pos, index, label, module, activation and weight; all but tokens stand at the
        last position, their scores are sums over positions. Edges with source, target (rows of nodes) and
        score. An error node of a layer holds what is not drawn: other heads and units, biases.
    """
    view.one_prompt()
    asked, plan = view.asked, view.plan
    (batch,), (other,) = asked.batches(view.texts)
    scores = torch.cat([found[0] for found in view.edges_by_prompt.unit_scores])
    best = set(scores.abs().topk(min(n_units, len(scores))).indices.tolist())
    groups: list[Tensor] = []
    units: list[tuple[Place, int, int]] = []
    start = 0
    for place, labels in zip(view.wanted.places, view.module_labels(), strict=True):
        group = torch.full((place.site.n_units,), -1)
        for unit in range(place.site.n_units):
            if start + unit in best:
                group[unit] = len(units)
                units.append((place, unit, int(labels[unit])))
        groups.append(group)
        start += place.site.n_units
    groups = [
        torch.where(group >= 0, group, len(units) + place.layer)
        for place, group in zip(view.wanted.places, groups, strict=True)
    ]
    wanted = Wanted(view.wanted.places, groups, len(units) + plan.n_layers, plan.heads)
    edges = edges_of(asked.model, batch, wanted, asked.target_of(1).values, other)
    return _unit_nodes(view, units, batch.tokens[0].tolist()), _unit_edges(view, edges, len(units))


def _unit_nodes(view: CircuitView, units: list[tuple[Place, int, int]], tokens: list[int]) -> pd.DataFrame:
    last = len(tokens) - 1
    values = dict(zip(view.unit_table["label"], view.unit_table["value"], strict=True))
    answer = int(view.asked.target_of(1).answers[0]) if view.asked.target != "loss" else -1
    rows = [
        ("embedding", -1, pos, token, view.tokens[pos], -1, np.nan, np.nan)
        for pos, token in enumerate(tokens)
    ]
    n_units = max(place.site.n_units for place in view.wanted.places)
    rows += [
        ("feature", layer, last, n_units + head, f"L{layer}H{head}", -1, np.nan, np.nan)
        for layer, head in view.plan.heads
    ]
    for place, unit, module in units:
        label = f"L{place.layer}{place.site.letter}{unit}"
        value = values.get(label, np.nan)
        rows.append(("feature", place.layer, last, unit, label, module, value, np.nan))
    rows += [
        ("error", layer, last, -1, "not drawn", -1, np.nan, np.nan) for layer in range(view.plan.n_layers)
    ]
    weight = float(np.exp(view.values[0])) if view.asked.target == "logprob" else 1.0
    rows.append(("logit", view.plan.n_layers, last, answer, view.title, -1, np.nan, weight))
    columns = ["kind", "layer", "pos", "index", "label", "module", "activation", "weight"]
    return pd.DataFrame(rows, columns=columns)


def _unit_edges(view: CircuitView, edges: Edges, n_units: int) -> pd.DataFrame:
    heads = edges.heads[:, 0].double().cpu().numpy()
    own = np.zeros(heads.shape[1:], dtype=bool)
    for layer, head in view.plan.heads:
        own[layer, head] = True
    kept = (
        np.stack([heads[:, layer, head] for layer, head in view.plan.heads], 1)
        if own.any()
        else heads[:, 0, :0]
    )
    groups = edges.groups[:, 0].double().cpu().numpy()
    rest = edges.errors[:, 0].double().cpu().numpy() + (heads * ~own).sum(-1) + groups[:, n_units:]
    matrix = np.concatenate(
        [edges.embedding[:, 0].double().cpu().numpy(), kept, groups[:, :n_units], rest], 1
    )
    n_tokens, n_heads = edges.embedding.shape[2], len(view.plan.heads)
    target = matrix.shape[1]
    receivers = [target, *range(n_tokens, n_tokens + n_heads + n_units)]
    table = pd.DataFrame(
        {
            "source": np.tile(np.arange(matrix.shape[1]), len(receivers)),
            "target": np.repeat(receivers, matrix.shape[1]),
            "score": matrix[: len(receivers)].ravel(),
        }
    )
    return table[table["score"] != 0].reset_index(drop=True)
