"""The graph of a circuit as a plotly figure, for those who want a picture file or their own changes."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_modules.viz.circuit_drawing import Drawable, Drawing, Edge, Node, draw
from tl_modules.viz.circuit_layout import WIDTH
from tl_modules.viz.figure import Figure
from tl_modules.viz.panels import canvas

_MARGIN = {"l": 5, "r": 5, "t": 30, "b": 5}
_HEADER_LINE = 17
_STEPS = np.linspace(0.0, 1.0, 24)


def circuit_figure(view: Drawable, threshold: float | None = None) -> Figure:
    """The graph of `circuit_svg` as a figure, with a trace for each edge and each node.

    `.write_image("circuit.png")` needs the extra `image` (kaleido) and a Chrome or Chromium.

    Args:
        view: the circuit.
        threshold: edges weaker than this share of the strongest are left out, 0 to 1; None draws the 120
            strongest.

    Raises:
        InputError: the threshold is not in [0, 1].

    Example:
        >>> {trace.type for trace in circuit_figure(view).data}
        {'scatter'}
    """
    drawing = draw(view, threshold)
    top = _MARGIN["t"] + _HEADER_LINE * (3 + len(view.header))
    figure = canvas(round(drawing.layout.height) + top + _MARGIN["b"], {**_MARGIN, "t": top})
    figure.add_traces([_edge_trace(edge) for edge in drawing.edges if edge.shown])
    figure.add_traces([_node_trace(node) for node in drawing.nodes])
    figure.add_trace(_labels(drawing))
    figure.update_layout(width=WIDTH, showlegend=False, hovermode="closest", title=_title(view))
    figure.update_xaxes(visible=False, range=[0, WIDTH], fixedrange=True)
    figure.update_yaxes(visible=False, range=[drawing.layout.height, 0], fixedrange=True)
    for lower, upper in drawing.layout.bands:
        place = {"x0": 2, "x1": WIDTH - 2, "y0": lower, "y1": upper, "layer": "below"}
        figure.add_shape(type="rect", fillcolor="rgba(128,128,128,0.1)", line={"width": 0}, **place)
    for name, y in drawing.layout.marks:
        figure.add_annotation(text=name, x=12, y=y, xanchor="left", showarrow=False, font={"size": 11})
    return figure


def _title(view: Drawable) -> dict[str, object]:
    lines = [*view.header, "red negative, blue positive"]
    below = "".join(f"<br><span style='font-size:12px'>{html.escape(line)}</span>" for line in lines)
    text = f"<b>{html.escape(view.title)}</b>{below}"
    place = {"x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top"}
    return {"text": text, "font": {"size": 16}, "pad": {"t": 24, "l": 10}, **place}


def _edge_trace(edge: Edge) -> go.Scatter:
    points = _along(edge.points)
    return go.Scatter(
        x=points[:, 0],
        y=points[:, 1],
        mode="lines",
        line={"color": edge.colour, "width": edge.width},
        opacity=edge.opacity,
        text=_breaks(edge.hover),
        hovertemplate="%{text}<extra></extra>",
    )


def _along(points: Float[np.ndarray, "4 2"]) -> Float[np.ndarray, "step 2"]:
    """Points of a cubic Bézier curve."""
    t = _STEPS[:, None]
    weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    return np.asarray(sum(w * p for w, p in zip(weights, points, strict=True)))


def _node_trace(node: Node) -> go.Scatter:
    box = node.box
    return go.Scatter(
        x=[box.left, box.right, box.right, box.left, box.left],
        y=[box.top, box.top, box.bottom, box.bottom, box.top],
        mode="lines",
        fill="toself",
        fillcolor=node.fill,
        line={"width": 0, "color": node.fill},
        opacity=0.35 if node.bare else 1.0,
        hoveron="fills",
        hoverinfo="text",
        text=_breaks(node.hover),
    )


def _labels(drawing: Drawing) -> go.Scatter:
    return go.Scatter(
        x=[node.box.x for node in drawing.nodes],
        y=[node.box.y for node in drawing.nodes],
        text=["<br>".join(html.escape(line, quote=False) for line in node.lines) for node in drawing.nodes],
        mode="text",
        textfont={"color": "#ffffff", "size": 11},
        hoverinfo="skip",
    )


def _breaks(text: str) -> str:
    return html.escape(text, quote=False).replace("\n", "<br>")
