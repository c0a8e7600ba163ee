"""Figure of selective pruning: what is lost of one ability over what is lost of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_modules.separability.metrics import relative
from tl_modules.separability.result import Separability
from tl_modules.viz.figure import Figure
from tl_modules.viz.panels import GRID, PALETTE, TEXT, canvas

_MARGIN = {"l": 60, "r": 20, "t": 20, "b": 60}
_HEIGHT = 430


def tradeoff_lines(runs: Mapping[str, Separability], metric: str = "top1") -> Figure:
    """A line for each run: the share lost on the forget set over that lost on the retain set, step by step.

    The diagonal is a fall in proportion; above it forget falls first. Thin grey lines are the random sets of
    the first run that has some.

    Args:
        runs: by name.
        metric: which accuracy; see `Separability.curves`.

    Example:
        >>> tradeoff_lines({}).layout.xaxis.title.text
        'lost on the retain set'
    """
    figure = canvas(_HEIGHT, _MARGIN)
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], **_plain("in proportion", "dash")))
    drawn = next((run.random for run in runs.values() if not run.random.empty), None)
    if drawn is not None:
        for number, own in drawn.groupby("run"):
            lost = (_lost(own[f"{name}_{metric}"].to_numpy()) for name in ("retain", "forget"))
            x, y = lost
            figure.add_trace(go.Scatter(x=x, y=y, **_plain("random", "solid"), showlegend=number == 0))
    for i, (name, run) in enumerate(runs.items()):
        figure.add_trace(_line(name, run, metric, PALETTE[i % len(PALETTE)]))
    ticks = {"tickformat": ".0%", "gridcolor": GRID, "zeroline": False}
    figure.update_xaxes(title="lost on the retain set", **ticks)
    figure.update_yaxes(title="lost on the forget set", **ticks)
    figure.update_layout(legend={"bgcolor": "rgba(0,0,0,0)", "x": 1, "xanchor": "right", "y": 0.02})
    return figure


def _line(name: str, run: Separability, metric: str, colour: str) -> go.Scatter:
    retain, forget = run.curves(metric)
    told = [
        f"{label}, {n:,} units" for label, n in zip(run.steps["pruned"], run.steps["n_pruned"], strict=True)
    ]
    return go.Scatter(
        x=_lost(retain),
        y=_lost(forget),
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        customdata=[text.removeprefix(", ") for text in told],
        hovertemplate="%{customdata}<br>retain −%{x:.1%}, forget −%{y:.1%}<extra>%{fullData.name}</extra>",
    )


def _lost(accuracy: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
    return 1 - relative(accuracy)


def _plain(name: str, dash: str) -> dict[str, Any]:
    line = {"color": TEXT, "width": 1, "dash": dash}
    return {"name": name, "mode": "lines", "line": line, "hoverinfo": "skip", "legendgroup": name}
