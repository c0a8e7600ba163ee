"""Crystals: do pairs of words in a relation differ by the same vector, and by more once distractors are out?

Source: Li et al. 2024 ("The Geometry of Concepts", arXiv 2410.19750), its smallest scale. There LDA is fitted
and scored on the same pairs; here no word is in both halves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly
from jaxtyping import Float
from tqdm.auto import tqdm

from tl_modules._checks import check_choice, check_integer, refuse
from tl_modules._places import layer_of
from tl_modules.geometry._length import length_gaps, length_regression
from tl_modules.geometry._pair_scores import (
    MEASURES,
    pair_scores,
    parallelogram_error,
    shuffled_seconds,
    silhouette,
    trapezoid_cosine,
)
from tl_modules.geometry.distractors import Distractors, fit_distractors
from tl_modules.geometry.pair_vectors import BATCH_TOKENS, PairVectors, read_at
from tl_modules.geometry.word_pairs import held_out

__all__ = [
    "MEASURES",
    "Crystals",
    "crystal_scores",
    "crystal_table",
    "parallelogram_error",
    "trapezoid_cosine",
]
_KINDS = ("raw", "signal", "random", "raw, shuffled", "signal, shuffled")


@dataclass(frozen=True, eq=False, repr=False)
class Crystals:
    """Scores of held-out pairs, before and after projection, and of what they are compared with.

    Made by `crystal_table` and `crystal_scores`.
    """

    scores: pd.DataFrame
    """One row a hook point, relation, kind of vectors and draw: hook_name, layer, relation, n_pairs, kind,
    draw, parallelogram, trapezoid, analogy and silhouette (see `pair_scores`). Kinds: "raw", the vectors as
    they are; "signal", projected on the signal basis that was fitted to the other words; "random", on a
    random subspace of as many dimensions; and "raw, shuffled" and "signal, shuffled", where each first word
    has the second word of another pair of its relation. One draw of the first two, many of the others."""
    fits: pd.DataFrame
    """One row a hook point: hook_name, layer, n_fitted, n_test (pairs), n_words (candidates of an analogy),
    n_keep, shrinkage, top_coordinate (the largest share of the differences' variance that is in a single
    coordinate: near 1 an attention sink hides the rest), silhouette_raw, silhouette_signal,
    silhouette_whitened (LDA's own transform) and silhouette_in_sample (of the fitted pairs, which says
    nothing), and length_slope, length_r2, length_p, signal_length_r2: the first principal component of all
    differences, each coordinate z-scored, regressed on length_gap, before and after projection."""
    length_gaps: pd.DataFrame
    """That component's mean and sd by length gap: hook_name, layer, length_gap, n, mean, sd."""
    distractors: Mapping[str, Distractors]
    """By hook point: projections for reuse, on steering vectors too."""
    settings: Mapping[str, Any]
    """How it was made; JSON-able."""

    def summary(self) -> pd.DataFrame:
        """Means over relations, which count alike.

        Returns:
            One row a hook point and measure: hook_name, layer, measure, a column for each kind (mean over
            draws), and p_random (signal against random subspaces), p_shuffled (raw) and p_signal_shuffled:
            (1 + draws at least as good) / (1 + draws).
        """
        by_draw = self.scores.groupby(["hook_name", "layer", "kind", "draw"], sort=False)[list(MEASURES)]
        means = by_draw.mean().reset_index()
        rows = []
        for (hook_name, layer), own in means.groupby(["hook_name", "layer"], sort=False):
            for measure in MEASURES:
                values = {kind: own.loc[own["kind"] == kind, measure].to_numpy() for kind in _KINDS}
                row = {"hook_name": hook_name, "layer": layer, "measure": measure}
                row |= {kind: drawn.mean() for kind, drawn in values.items()}
                rows.append(row | _chances(values, -1.0 if measure == "parallelogram" else 1.0))
        return pd.DataFrame(rows)

    def by_relation(self, measure: str = "analogy", kind: str = "signal") -> pd.DataFrame:
        """One measure of each relation (rows) at each layer (columns), mean over draws.

        Args:
            measure: "parallelogram", "trapezoid", "analogy" or "silhouette".
            kind: see `scores`.

        Raises:
            InputError: no such measure or kind.
        """
        check_choice("measure", measure, MEASURES)
        own = self.scores[self.scores["kind"] == check_choice("kind", kind, _KINDS)]
        names = self.scores["hook_name"].unique()
        table = own.pivot_table(measure, "relation", "hook_name", sort=False, dropna=False)
        return table.reindex(columns=names)

    def plot(self) -> plotly.graph_objects.Figure:
        """Each measure by layer, a line a kind."""
        from tl_modules.viz.geometry_crystals import crystal_lines

        return crystal_lines(self)

    def __len__(self) -> int:
        return len(self.fits)

    def __repr__(self) -> str:
        n_relations = self.scores["relation"].nunique()
        n_test = self.fits["n_test"].iloc[0]
        return f"Crystals({len(self)} hook points, {n_relations} relations, {n_test} held-out pairs)"

    def _repr_html_(self) -> str:
        table = self.summary().to_html(index=False, float_format=lambda value: f"{value:.3g}")
        return f"<p><strong>{self!r}</strong></p>{table}"


def crystal_table(
    model: Any,
    pairs: Any,
    hook_names: Iterable[str],
    *,
    n_keep: int | None = None,
    shrinkage: float | int | None = None,
    share: float | int = 0.5,
    n_draws: int = 19,
    prepend_bos: bool | None = True,
    before: str = "",
    batch_tokens: int = BATCH_TOKENS,
    random_state: int = 0,
    progress: bool = True,
) -> Crystals:
    """Score word pairs at several hook points, relation by relation, on words that the fit did not see.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: of two relations or more; see `pair_differences`.
        hook_names: where to read; all in one pass of the model. The embedding is "blocks.0.hook_resid_pre".
        n_keep: see `fit_distractors`.
        shrinkage: see there.
        share: of the pairs that are held out; see `held_out`.
        n_draws: random subspaces, and shuffled pairings.
        prepend_bos: see `pair_differences`.
        before: see there.
        batch_tokens: see there.
        random_state: parts the words and draws the rest.
        progress: show bars.

    Raises:
        InputError: see `pair_differences`, `held_out` and `fit_distractors`.

    Example:
        >>> crystal_table(None, [("up", "down")], "blocks.0.hook_resid_pre")
        Traceback (most recent call last):
        ...
        tl_modules._checks.InputError: hook_names: got 'blocks.0.hook_resid_pre', expected a list of...
    """
    if isinstance(hook_names, str):
        refuse("hook_names", got=repr(hook_names), want="a list of hook points")
    names = list(hook_names)
    read = read_at(
        model,
        pairs,
        names,
        prepend_bos=prepend_bos,
        before=before,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    parts = [
        crystal_scores(
            read[name],
            n_keep=n_keep,
            shrinkage=shrinkage,
            share=share,
            n_draws=n_draws,
            random_state=random_state,
        )
        for name in tqdm(names, desc="hook points", disable=not progress)
    ]
    return _joined(parts)


def crystal_scores(
    vectors: PairVectors,
    *,
    n_keep: int | None = None,
    shrinkage: float | int | None = None,
    share: float | int = 0.5,
    n_draws: int = 19,
    random_state: int = 0,
) -> Crystals:
    """The same for pairs whose vectors are there: `pair_differences`, or features by `feature_differences`.

    Args:
        vectors: of the pairs of two relations or more.
        n_keep: see `crystal_table`, as are the other arguments.
        shrinkage: see there.
        share: see there.
        n_draws: see there.
        random_state: see there.

    Raises:
        InputError: see `held_out` and `fit_distractors`.

    Example:
        >>> from tl_modules.geometry.pair_vectors import feature_differences
        >>> rng, pairs = np.random.default_rng(0), np.arange(40).reshape(20, 2)
        >>> directions = rng.normal(size=(40, 8))
        >>> directions[1::2] = directions[::2] + 3 * np.eye(8)[np.arange(20) // 10]
        >>> vectors = feature_differences(directions, {"one": pairs[:10], "two": pairs[10:]})
        >>> found = crystal_scores(vectors)
        >>> found
        Crystals(1 hook points, 2 relations, 10 held-out pairs)
        >>> found.summary().set_index("measure")[["raw", "raw, shuffled"]].round(1)
                       raw  raw, shuffled
        measure
        parallelogram  0.0            1.2
        trapezoid      1.0            0.3
        analogy        1.0            0.1
        silhouette     1.0            0.1
    """
    check_integer("n_draws", n_draws, least=1)
    test = held_out(vectors.pairs, share=share, random_state=random_state)
    known, unseen = vectors.subset(~test), vectors.subset(test)
    fitted = fit_distractors(known.differences, known.labels, n_keep, shrinkage)
    rng = np.random.default_rng(random_state)
    name = str(vectors.settings.get("hook_name", "directions"))
    place = {"hook_name": name, "layer": layer_of(name) if "hook_name" in vectors.settings else -1}
    settings = dict(vectors.settings) | {"share": share, "n_draws": n_draws, "random_state": random_state}
    return Crystals(
        scores=_placed(_all_scores(unseen, fitted, n_draws, rng), place),
        fits=_placed(pd.DataFrame([_fit_facts(vectors, known, unseen, fitted)]), place),
        length_gaps=_placed(length_gaps(vectors), place),
        distractors={name: fitted},
        settings=settings,
    )


def _placed(table: pd.DataFrame, place: Mapping[str, Any]) -> pd.DataFrame:
    for position, (name, value) in enumerate(place.items()):
        table.insert(position, name, value)
    return table


def _all_scores(
    unseen: PairVectors, fitted: Distractors, n_draws: int, rng: np.random.Generator
) -> pd.DataFrame:
    raw = (unseen.first, unseen.second)
    signal = (fitted.coordinates(unseen.first), fitted.coordinates(unseen.second))
    found = [("raw", 0, pair_scores(*raw, unseen.pairs)), ("signal", 0, pair_scores(*signal, unseen.pairs))]
    for draw in range(n_draws):
        basis = _random_basis(len(fitted.signal_basis), fitted.n_keep, rng)
        found.append(("random", draw, pair_scores(raw[0] @ basis, raw[1] @ basis, unseen.pairs)))
        order = shuffled_seconds(unseen.pairs, rng)
        pairs = unseen.pairs.assign(second=unseen.pairs["second"].to_numpy()[order])
        for kind, (first, second) in (("raw", raw), ("signal", signal)):
            found.append((f"{kind}, shuffled", draw, pair_scores(first, second[order], pairs)))
    return pd.concat([table.assign(kind=kind, draw=draw) for kind, draw, table in found], ignore_index=True)


def _random_basis(d: int, rank: int, rng: np.random.Generator) -> Float[np.ndarray, "dimension kept"]:
    return np.linalg.qr(rng.normal(size=(d, rank)))[0]


def _fit_facts(
    vectors: PairVectors, known: PairVectors, unseen: PairVectors, fitted: Distractors
) -> dict[str, Any]:
    own, other = unseen.differences, unseen.labels
    facts = {
        "n_fitted": len(known),
        "n_test": len(unseen),
        "n_words": len(np.unique(unseen.pairs[["first", "second"]].to_numpy(str))),
        "n_keep": fitted.n_keep,
        "shrinkage": fitted.shrinkage,
        "top_coordinate": _top_coordinate(vectors.differences),
        "silhouette_raw": silhouette(own, other),
        "silhouette_signal": silhouette(fitted.coordinates(own), other),
        "silhouette_whitened": silhouette(fitted.whitened(own), other),
        "silhouette_in_sample": silhouette(fitted.coordinates(known.differences), known.labels),
    }
    return facts | length_regression(vectors, fitted)


def _top_coordinate(differences: Float[np.ndarray, "pair dimension"]) -> float:
    variance = differences.var(0)
    return float(variance.max() / variance.sum())


def _chances(values: Mapping[str, np.ndarray], better: float) -> dict[str, float]:
    """How often draws are at least as good; `better` is 1 for the more the better, else -1."""
    compared = {
        "p_random": ("signal", "random"),
        "p_shuffled": ("raw", "raw, shuffled"),
        "p_signal_shuffled": ("signal", "signal, shuffled"),
    }
    chances = {}
    for name, (kind, null) in compared.items():
        as_good = better * values[null] >= better * values[kind][0]
        known = not np.isnan(values[kind]).any()
        chances[name] = (1 + as_good.sum()) / (1 + len(as_good)) if known else np.nan
    return chances


def _joined(parts: list[Crystals]) -> Crystals:
    tables = {
        name: pd.concat([getattr(part, name) for part in parts], ignore_index=True)
        for name in ("scores", "fits", "length_gaps")
    }
    distractors = {name: fitted for part in parts for name, fitted in part.distractors.items()}
    settings = {key: value for key, value in parts[0].settings.items() if key != "hook_name"}
    return Crystals(**tables, distractors=distractors, settings=settings | {"hook_names": list(distractors)})
