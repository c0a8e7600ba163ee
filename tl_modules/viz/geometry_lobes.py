"""Figures of lobes: agreement with geometry over their number, a map of units, and the texts they win."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from tl_modules._checks import MissingExtraError, check_choice, refuse
from tl_modules.geometry.affinities import as_rows, unit_directions
from tl_modules.geometry.clusters import Lobes
from tl_modules.geometry.lobe_tables import LobeTable
from tl_modules.viz.figure import Figure
from tl_modules.viz.panels import GRID, PALETTE, TEXT, canvas

_MARGIN = {"l": 60, "r": 20, "t": 20, "b": 60}
_HEIGHT = 430
_NAMES = {"phi": "φ", "simple_matching": "simple matching"}
_ROW = 26
_AXES = {
    "own": ("", ""),
    "pca": ("first principal component", "second principal component"),
    "umap": ("UMAP 1", "UMAP 2"),
}
_MOST_NAMED = 12
"""Lobes that a legend still tells apart."""


def lobe_lines(found: LobeTable) -> Figure:
    """Adjusted mutual information with the geometric clusters against the number of lobes.

    A line for each affinity, and in grey the mean of random directions, clustered anew.

    Example:
        >>> from tl_modules.geometry.counting import Cooccurrence
        >>> from tl_modules.geometry.lobe_tables import lobe_table
        >>> bits = np.random.default_rng(0).random((50, 12)) < 0.5
        >>> rows = np.random.default_rng(1).normal(size=(12, 4))
        >>> table = lobe_table(Cooccurrence.from_bits(bits), rows, [2, 3], ["phi"], progress=False)
        >>> [line.name for line in lobe_lines(table).data]
        ['φ', 'random directions']
    """
    figure = canvas(_HEIGHT, _MARGIN)
    for colour, (kind, own) in zip(PALETTE, found.table.groupby("affinity", sort=False), strict=False):
        figure.add_trace(_line(own, "ami", _NAMES.get(str(kind), str(kind)), {"color": colour, "width": 2}))
    if "null_mean_random" in found.table:
        null = found.table.groupby("n_lobes")["null_mean_random"].mean().reset_index()
        style = {"color": TEXT, "width": 1, "dash": "dash"}
        figure.add_trace(_line(null, "null_mean_random", "random directions", style))
    ticks = sorted(found.table["n_lobes"].unique())
    figure.update_xaxes(
        title="lobes", type="log", tickvals=ticks, ticktext=[str(k) for k in ticks], gridcolor=GRID
    )
    figure.update_yaxes(
        title="AMI with geometric clusters", gridcolor=GRID, zeroline=False, rangemode="tozero"
    )
    figure.update_layout(
        legend={"bgcolor": "rgba(0,0,0,0)", "orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return figure.update_layout(margin={"t": 50})


def _line(table: pd.DataFrame, column: str, name: str, style: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=table["n_lobes"],
        y=table[column],
        name=name,
        mode="lines+markers",
        line=style,
        hovertemplate="%{x} lobes<br>%{fullData.name}: %{y:.3f}<extra></extra>",
    )


def lobe_map(lobes: Lobes, places: Any, method: str | None = None) -> Figure:
    """A point for each unit, coloured by lobe; units that were dropped are left out.

    Args:
        lobes: the lobes.
        places: directions [unit, d_model], or places [unit, 2] of your own making.
        method: "pca" shows directions by the first two principal components of the unit vectors, "umap" by
            a UMAP of their angles (with the seed of the lobes), which is no part of the package: pip install
            umap-learn. None shows your own places as they are, directions by "pca".

    Raises:
        InputError: another number of rows than units, or another method.
        MissingExtraError: umap-learn is not installed.

    Example:
        >>> from tl_modules.geometry.counting import Cooccurrence
        >>> from tl_modules.geometry.clusters import lobes
        >>> bits = np.random.default_rng(0).random((50, 12)) < 0.5
        >>> found = lobes(Cooccurrence.from_bits(bits), 2)
        >>> sum(len(group.x) for group in lobe_map(found, np.eye(12)).data)
        12
    """
    rows = as_rows(places)
    if len(rows) != len(lobes.labels):
        refuse("places", got=f"{len(rows)} rows", want=f"one for each of the {len(lobes.labels)} units")
    kept = lobes.labels >= 0
    if method is None:
        method = "own" if rows.shape[1] == 2 else "pca"
    else:
        check_choice("method", method, ["pca", "umap"])
    at = rows[kept] if method == "own" else _placed(unit_directions(rows[kept]), method, lobes)
    figure = canvas(_HEIGHT, _MARGIN)
    for lobe in range(lobes.n_lobes):
        here = lobes.labels[kept] == lobe
        figure.add_trace(
            go.Scattergl(
                x=at[here, 0],
                y=at[here, 1],
                name=f"lobe {lobe} ({here.sum():,})",
                mode="markers",
                marker={"size": 5, "opacity": 0.7, "color": PALETTE[lobe % len(PALETTE)]},
                text=lobes.units["label"].to_numpy()[kept][here],
                hovertemplate="%{text}<extra>%{fullData.name}</extra>",
            )
        )
    names = _AXES[method]
    figure.update_xaxes(title=names[0], gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title=names[1], gridcolor=GRID, zeroline=False)
    return figure.update_layout(showlegend=lobes.n_lobes <= _MOST_NAMED)


def _placed(
    unit: Float[np.ndarray, "unit d_model"], method: str, lobes: Lobes
) -> Float[np.ndarray, "unit 2"]:
    if method == "pca":
        return _principal(unit)
    try:
        umap = import_module("umap")
    except ImportError as error:
        raise MissingExtraError(
            "A map by UMAP needs umap, which is not installed: pip install umap-learn"
        ) from error
    mapper = umap.UMAP(n_components=2, metric="cosine", random_state=lobes.source["random_state"])
    return np.asarray(mapper.fit_transform(unit), np.float64)


def _principal(rows: Float[np.ndarray, "unit d_model"]) -> Float[np.ndarray, "unit 2"]:
    """Coordinates along the two directions of largest variance; each points to its largest entry."""
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, -2:][:, ::-1]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return centred @ axes


def lobe_wins(wins: pd.DataFrame) -> Figure:
    """A heat map of the share of each kind's blocks that each lobe wins; see `Lobes.wins`.

    Example:
        >>> table = pd.DataFrame({"n_blocks": [3], 0: [1 / 3], 1: [2 / 3], "majority": [1]}, index=["prose"])
        >>> lobe_wins(table).data[0].text[0][1]
        '67 %'
    """
    shares = wins.drop(columns=["n_blocks", "majority"])
    labels = [f"{kind} ({n:,})" for kind, n in zip(wins.index, wins["n_blocks"], strict=True)]
    figure = canvas(100 + _ROW * len(wins), {"l": 10, "r": 20, "t": 20, "b": 50})
    figure.add_trace(
        go.Heatmap(
            z=shares.to_numpy(),
            x=[f"lobe {lobe}" for lobe in shares.columns],
            y=labels,
            text=[[f"{100 * share:.0f} %" for share in row] for row in shares.to_numpy()],
            texttemplate="%{text}",
            colorscale=[[0, "rgba(78,121,167,0)"], [1, PALETTE[0]]],
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate="%{y}<br>%{x} wins %{text}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(showgrid=False)
    return figure
