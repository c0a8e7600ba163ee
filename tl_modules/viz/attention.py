"""Attention patterns and coloured tokens as HTML without network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import numpy as np
from jaxtyping import Float

from tl_modules.viz.circuit_drawing import visible
from tl_modules.viz.html import render

MOST_TOKENS = 64
"""Of a longer prompt the last ones are drawn."""

_LEAST = 0.02
"""Weights below this are not drawn in the still pictures."""

_CELL = 7


def attention_html(
    patterns: Float[np.ndarray, "head pos pos"], tokens: Sequence[str], names: Sequence[str]
) -> str:
    """Attention patterns: rows look, columns are looked at.

    Where circuitsvis is installed and `attention_library` is on the page, its view takes the place of the
    still pictures; text of tokens cannot break out of the script.

    Args:
        patterns: the weights of each head.
        tokens: text of each position.
        names: of the heads, such as "L9H6".

    Example:
        >>> attention_html(np.eye(2)[None], ["a", "b"], ["L0H1"]).count("<svg")
        1
    """
    patterns, tokens = patterns[:, -MOST_TOKENS:, -MOST_TOKENS:], list(tokens)[-MOST_TOKENS:]
    facts = {
        "attention": np.round(patterns, 4).tolist(),
        "tokens": [visible(token) for token in tokens],
        "attentionHeadNames": list(names),
        "maskUpperTri": True,
        "minValue": 0,
        "maxValue": 1,
    }
    return render(
        "attention.html.j2",
        name=f"tlm-{uuid4().hex[:12]}",
        pictures=[(name, _cells(pattern)) for name, pattern in zip(names, patterns, strict=True)],
        side=_CELL * len(tokens),
        cell=_CELL,
        facts=json.dumps(facts).replace("</", "<\\/").replace("<!--", "<\\u0021--"),
        live=find_spec("circuitsvis") is not None,
    )


@cache
def attention_library() -> str:
    """The script element that holds circuitsvis (1.3 MB); empty where it is not installed.

    Example:
        >>> "CircuitsVis" in attention_library()
        True
    """
    found = find_spec("circuitsvis")
    if found is None or found.origin is None:
        return ""
    script = Path(found.origin).parent / "dist" / "cdn" / "iife.js"
    text = script.read_text(encoding="utf-8").replace("</script", "<\\/script")
    return f"<script>{text.partition('//# sourceMappingURL')[0]}\nwindow.CircuitsVis = CircuitsVis;</script>"


def token_html(tokens: Sequence[str], values: Float[np.ndarray, " pos"], what: str) -> str:
    """The prompt with each token coloured by a value that is not negative; the number is its hover text.

    Args:
        tokens: text of each position.
        values: one for each token; the largest has the full colour.
        what: what the values are.

    Example:
        >>> token_html(["a", "<b>"], np.array([0.0, 2.0]), "mean value").count("&lt;b&gt;")
        1
    """
    most = max(float(values.max(initial=0.0)), 1e-30)
    parts = [
        (visible(token) + "\n" * token.count("\n"), value, max(0.0, value / most))
        for token, value in zip(tokens, values.tolist(), strict=True)
    ]
    return render("tokens.html.j2", parts=parts, what=what, most=most)


def _cells(pattern: Float[np.ndarray, "pos pos"]) -> list[tuple[int, int, float]]:
    """Place and weight of each cell that is worth drawing."""
    rows, columns = np.nonzero(pattern >= _LEAST)
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(_CELL * column, _CELL * row, float(pattern[row, column])) for row, column in places]
