"""The nodes of a circuit and the edges between them, as tables over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_modules.circuits.edges import Edges

SMALLEST = 1e-6
"""Edges below this share of the strongest are left out of tables."""


@dataclass(frozen=True)
class Plan:
    """Which nodes there are, and in which order edges hold them."""

    starts: list[int]
    """The first layer of each band."""
    n_layers: int
    names: list[str]
    """Of the modules."""
    heads: list[tuple[int, int]]
    """Those with a node of their own, by layer."""
    tokens: list[str]
    """Of the one prompt; empty where there are several."""

    def band_of(self, layer: int) -> int:
        """The band that a layer is in."""
        return int(np.searchsorted(self.starts, layer, side="right")) - 1

    def ends(self, band: int) -> tuple[int, int]:
        """First and last layer of a band."""
        return self.starts[band], [*self.starts[1:], self.n_layers][band] - 1

    @property
    def n_groups(self) -> int:
        """Modules, and units in none, by band."""
        return len(self.starts) * (len(self.names) + 1)

    def group(self, layer: int, module: int) -> int:
        """The group of a unit; module -1 is that of units in none."""
        width = len(self.names) + 1
        return self.band_of(layer) * width + (module if module >= 0 else width - 1)

    def table(self) -> pd.DataFrame:
        """One row a node: id, kind, layer, last_layer, index and label; senders first, the target last."""
        rows: list[tuple[str, str, int, int, int, str]] = []
        if self.tokens:
            rows += [
                (f"token:{pos}", "embedding", -1, -1, pos, f"{token} ({pos})")
                for pos, token in enumerate(self.tokens)
            ]
        else:
            rows.append(("tokens", "embedding", -1, -1, -1, "tokens"))
        rows += [
            (f"L{layer}H{head}", "head", layer, layer, head, f"L{layer}H{head}") for layer, head in self.heads
        ]
        for band in range(len(self.starts)):
            first, last = self.ends(band)
            span = f"{first}-{last}"
            rows.append((f"heads:{span}", "other_heads", first, last, -1, f"other heads {span}"))
        for band in range(len(self.starts)):
            first, last = self.ends(band)
            span = f"{first}-{last}"
            rows += [
                (f"M{index}:{span}", "module", first, last, index, f"{index} {name} {span}")
                for index, name in enumerate(self.names)
            ]
            rows.append((f"other:{span}", "other", first, last, -1, f"other units {span}"))
        for band in range(len(self.starts)):
            first, last = self.ends(band)
            span = f"{first}-{last}"
            rows.append((f"error:{span}", "error", first, last, -1, f"biases, errors {span}"))
        rows.append(("target", "target", self.n_layers, self.n_layers, -1, "target"))
        return pd.DataFrame(rows, columns=["id", "kind", "layer", "last_layer", "index", "label"])

    def matrix(self, edges: Edges) -> Float[np.ndarray, "receiver sender prompt"]:
        """Edges between nodes: to the target, the heads and the groups, from all but the target."""
        bands = np.array([self.band_of(layer) for layer in range(self.n_layers)])
        own = np.zeros(edges.heads.shape[2:], dtype=bool)
        for layer, head in self.heads:
            own[layer, head] = True
        heads = edges.heads.double().cpu().numpy()
        kept = [heads[:, :, layer, head][..., None] for layer, head in self.heads]
        rest = (heads * ~own).sum(-1)
        by_band = np.eye(len(self.starts))[bands]
        embedding = edges.embedding.double().cpu().numpy()
        parts = [
            embedding if self.tokens else embedding.sum(-1, keepdims=True),
            *kept,
            rest @ by_band,
            edges.groups.double().cpu().numpy(),
            edges.errors.double().cpu().numpy() @ by_band,
        ]
        return np.concatenate(parts, -1).transpose(0, 2, 1)


def summary(by_prompt: Float[np.ndarray, "row prompt"], column: str = "score") -> dict[str, np.ndarray]:
    """Mean, standard error and share of prompts with the mean's sign, of each row.

    Example:
        >>> summary(np.array([[1.0, 3.0, -1.0]]))
        {'score': array([1.]), 'standard_error': array([1.15...]), 'consistency': array([0.66...])}
    """
    n = by_prompt.shape[1]
    mean = by_prompt.mean(1)
    if n < 2:
        nothing = np.full(len(mean), np.nan)
        return {column: mean, "standard_error": nothing, "consistency": nothing}
    error = by_prompt.std(1, ddof=1) / np.sqrt(n)
    agree = (np.sign(by_prompt) == np.sign(mean)[:, None]).mean(1)
    return {column: mean, "standard_error": error, "consistency": agree}


def edge_table(
    matrix: Float[np.ndarray, "receiver sender prompt"], nodes: pd.DataFrame, receivers: Sequence[str]
) -> pd.DataFrame:
    """One row an edge, the strongest first: source, target, score, standard_error, consistency."""
    senders = nodes["id"].to_numpy()[: matrix.shape[1]]
    flat = matrix.reshape(-1, matrix.shape[2])
    table = pd.DataFrame(
        {
            "source": np.tile(senders, len(receivers)),
            "target": np.repeat(np.asarray(receivers, dtype=object), len(senders)),
            **summary(flat),
        }
    )
    size = table["score"].abs()
    kept = table[size > SMALLEST * size.max()]
    return kept.sort_values("score", key=np.abs, ascending=False, kind="stable", ignore_index=True)
