"""A plotly figure that is still there after nbconvert, without network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
"""Settings with which all figures are drawn: they follow the page's width and carry no outside link."""

_PLOTLY = "application/vnd.plotly.v1+json"

_carriers: set[str] = set()
"""Notebook cells whose output holds plotly.js."""


class Figure(go.Figure):
    """A `plotly.graph_objects.Figure` whose notebook output carries `text/html` beside plotly's own type.

    In a kernel plotly emits its own mimetype alone, which nbconvert drops, so exported notebooks lose their
    figures. Here the `text/html` holds plotly.js itself (5 MB) in the first cell that shows a figure, and
    only the data in every later one: no network, and one copy a notebook. Running the first cell again puts
    the library there again. No renderer is set; one chosen by the user that makes HTML is respected.

    Example:
        >>> "text/html" in Figure(data=[{"type": "bar", "y": [1, 2]}])._repr_mimebundle_()
        True
    """

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bundle = dict(super()._repr_mimebundle_(*args, **kwargs) or {})
        if "text/html" not in bundle:
            bundle["text/html"] = self._repr_html_()
        return bundle

    def _ipython_display_(self) -> None:
        bundle = self._repr_mimebundle_()
        if _PLOTLY in bundle:
            from IPython.display import display

            display(bundle, raw=True)  # type: ignore[no-untyped-call]
        else:
            super()._ipython_display_()

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show the figure: in a notebook as its cell's output, else (or with arguments) as plotly does."""
        if args or kwargs or _PLOTLY not in super()._repr_mimebundle_():
            super().show(*args, **kwargs)
        else:
            self._ipython_display_()

    def _repr_html_(self) -> str:
        return library_once() + div(self)


def div(figure: go.Figure) -> str:
    """The figure as an HTML element for a page that holds plotly.js already."""
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))


def library() -> str:
    """The script element that holds plotly.js."""
    return f"<script>{get_plotlyjs()}</script>"


def once(carriers: set[str], make: Callable[[], str]) -> str:
    """What `make` gives, for the first notebook cell that asks and for the same cell run again; else nothing.

    Args:
        carriers: the cells that have it, which this function keeps.
        make: gives a library as HTML.
    """
    cell = _cell()
    if carriers and cell not in carriers:
        return ""
    carriers.add(cell)
    return make()


def library_once() -> str:
    """The library where this notebook cell is to hold it."""
    return once(_carriers, library)


def _cell() -> str:
    """The notebook cell being run, as the frontend names it; empty where it names none."""
    try:
        from IPython import get_ipython

        parent = get_ipython().get_parent()
        return str(parent["metadata"].get("cellId", parent["header"]["msg_id"]))
    except (ImportError, AttributeError, KeyError, TypeError):
        return ""
