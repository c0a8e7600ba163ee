"""Modules beside lobes: are they the same groups, and are modules compact in the space they write to?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_modules._checks import check_choice, check_integer, refuse
from tl_modules.geometry._agreement import MutualInformation, against_null, permuted_within
from tl_modules.geometry.affinities import unit_directions
from tl_modules.geometry.clusters import Lobes

Labels = Int[np.ndarray, " unit"]
_WHOLE = "all"


def compare_with_modules(
    lobes: Lobes, modules: Any, *, n_permutations: int = 100, random_state: int = 0
) -> pd.DataFrame:
    """How far lobes, and geometric clusters, are the modules of the same units.

    Units are matched by label; those that are in no lobe or in no module are left out. The null permutes
    the other labels among the units of each layer, so that agreement on layers alone is not counted.

    Args:
        lobes: lobes of some units.
        modules: `Modules` of the same units, or of some of them.
        n_permutations: draws of the null.
        random_state: its seed.

    Returns:
        A row for all units and one for each layer, for `lobes` and, where known, `geometry`: compared,
        layer, n_units, ari, ami, null_mean, z and p of the AMI.

    Raises:
        InputError: fewer than 2 units in both.

    Example:
        >>> from tl_modules.geometry.counting import Cooccurrence
        >>> from tl_modules.geometry.clusters import lobes
        >>> rates = np.tile(np.repeat([[0.6, 0.1], [0.1, 0.6]], 100, axis=0), 4)
        >>> bits = np.random.default_rng(0).random((200, 8)) < rates
        >>> found = lobes(Cooccurrence.from_bits(bits, acts.units), 2)
        >>> compare_with_modules(found, modules)[["compared", "layer", "n_units", "ari"]]
          compared layer  n_units  ari
        0    lobes   all        8  1.0
        1    lobes     0        4  1.0
        2    lobes     1        4  1.0
    """
    check_integer("n_permutations", n_permutations, least=2)
    rng = np.random.default_rng(random_state)
    of_module = pd.Series(modules.unit_labels, index=modules.units["label"])
    own = of_module.reindex(lobes.units["label"]).fillna(-1).to_numpy(np.int64)
    layers = lobes.units["layer"].to_numpy(np.int64)
    both = {"lobes": lobes.labels, "geometry": lobes.geometric_labels}
    rows = []
    for name, other in both.items():
        kept = (own >= 0) & (other >= 0)
        if kept.sum() >= 2:
            parts = [(_WHOLE, kept), *((int(n), kept & (layers == n)) for n in np.unique(layers[kept]))]
            rows += [
                {"compared": name, "layer": layer}
                | _agreement(own[part], other[part], layers[part], n_permutations, rng)
                for layer, part in parts
            ]
    if not rows:
        refuse("modules", got="no two units that are in a lobe and in a module", want="the same units")
    return pd.DataFrame(rows)


def _agreement(
    first: Labels, second: Labels, layers: Labels, n_permutations: int, rng: np.random.Generator
) -> dict[str, Any]:
    from sklearn.metrics import adjusted_rand_score

    shared = MutualInformation(first, second)
    ami = shared.adjusted(second)
    null = [shared.adjusted(permuted_within(second, layers, rng)) for _ in range(n_permutations)]
    against = against_null(ami, np.array(null))
    return {
        "n_units": len(first),
        "ari": float(adjusted_rand_score(first, second)),
        "ami": ami,
        "null_mean": against["mean"],
        "z": against["z"],
        "p": against["p"],
    }


def compactness(
    labels: Any,
    directions: Any,
    layers: Any = None,
    *,
    measure: str = "cosine",
    n_permutations: int = 200,
    random_state: int = 0,
) -> pd.DataFrame:
    """Do the units of a group write directions that are alike, beyond what chance gives?

    The mean cosine over all pairs of units of the same group and layer, against the same after labels are
    permuted among the units of each layer.

    Args:
        labels: the group of each unit: `modules.unit_labels` or `lobes.labels`; -1 for none.
        directions: [unit, d_model], of any length.
        layers: the layer (or whatever is to be kept apart) of each unit; None for one.
        measure: "cosine", or "squared", where opposite directions count as alike, which suits units whose
            values have both signs, such as gated neurons.
        n_permutations: draws of the null.
        random_state: its seed.

    Returns:
        A row for each layer and one, "all", for the pairs of all layers together: layer, n_units, n_groups
        (with at least 2 units there), n_pairs, within, null_mean, null_sd, z and p. Layers without such a
        pair are left out.

    Raises:
        InputError: lengths that differ, a direction of length 0, or no pair of units in any group.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1], 20)
        >>> table = compactness(labels, np.eye(2, 8)[labels] + 0.3 * rng.normal(size=(40, 8)))
        >>> table[["layer", "n_pairs", "p"]]
          layer  n_pairs      p
        0     0      380  0.005
        1   all      380  0.005
    """
    check_choice("measure", measure, ["cosine", "squared"])
    check_integer("n_permutations", n_permutations, least=2)
    labels, layers, unit = _aligned(labels, directions, layers)
    rng = np.random.default_rng(random_state)
    sums: dict[Any, tuple[np.ndarray, float, int, int]] = {}
    for layer in np.unique(layers):
        here = (layers == layer) & (labels >= 0)
        own, total = labels[here], _total(unit[here], measure)
        sizes = np.unique(own, return_counts=True)[1]
        if n_pairs := int((sizes * (sizes - 1)).sum()) // 2:
            draws = np.array([total(own), *(total(rng.permutation(own)) for _ in range(n_permutations))])
            sums[int(layer)] = (draws, float(n_pairs), len(own), int((sizes > 1).sum()))
    if not sums:
        refuse("labels", got="no two units of a group in a layer", want="at least one such pair")
    sums[_WHOLE] = (
        np.sum([draws for draws, *_ in sums.values()], axis=0),
        sum(n_pairs for _, n_pairs, *_ in sums.values()),
        sum(n for _, _, n, _ in sums.values()),
        len(np.unique(labels[labels >= 0])),
    )
    return pd.DataFrame([_row(layer, *facts) for layer, facts in sums.items()])


def _row(layer: Any, draws: np.ndarray, n_pairs: float, n_units: int, n_groups: int) -> dict[str, Any]:
    means = draws / n_pairs
    null = against_null(float(means[0]), means[1:])
    return {
        "layer": layer,
        "n_units": n_units,
        "n_groups": n_groups,
        "n_pairs": int(n_pairs),
        "within": float(means[0]),
        "null_mean": null["mean"],
        "null_sd": null["sd"],
        "z": null["z"],
        "p": null["p"],
    }


def _aligned(labels: Any, directions: Any, layers: Any) -> tuple[Labels, Labels, np.ndarray]:
    unit = unit_directions(directions)
    labels = np.asarray(labels, np.int64)
    layers = np.zeros(len(unit), np.int64) if layers is None else np.asarray(layers, np.int64)
    for name, given in {"labels": labels, "layers": layers}.items():
        if given.shape != (len(unit),):
            refuse(name, got=f"shape {given.shape}", want=f"one for each of the {len(unit)} directions")
    return labels, layers, unit


def _total(unit: Float[np.ndarray, "unit d_model"], measure: str) -> Callable[[Labels], float]:
    """The sum of the measure over all pairs of the same label, as a function of the labels.

    The squared length of a group's sum is the sum of its cosines over ordered pairs, each unit with itself
    included; of squared cosines the same holds of its second moments.
    """

    def total(labels: Labels) -> float:
        order = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(labels[order], prepend=labels[order[:1]] - 1))
        rows = unit[order]
        if measure == "cosine":
            return float(((np.add.reduceat(rows, starts, axis=0) ** 2).sum() - len(labels)) / 2)
        groups = np.split(rows, starts[1:])
        both = (group @ group.T if len(group) < group.shape[1] else group.T @ group for group in groups)
        return float((sum((product**2).sum() for product in both) - len(labels)) / 2)

    return total
