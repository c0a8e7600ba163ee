"""`find_modules`: from activations to modules in one call."""

from __future__ import annotations

from typing import Any

import numpy as np

from tl_modules._checks import check_choice, check_integer, nearest, refuse
from tl_modules.activations import UnitActivations
from tl_modules.methods import named_estimators
from tl_modules.modules import Modules


def find_modules(
    acts: UnitActivations,
    n_modules: int,
    *,
    method: Any = "iterd",
    random_state: int | np.random.RandomState | None = 0,
    progress: bool = True,
    **settings: Any,
) -> Modules:
    """Decompose activations into modules of units and samples.

    Categories in `acts.samples` are never shown to the method: it sees the matrix alone.

    Args:
        acts: activations, as `collect` makes them; raw, the method standardises them itself.
        n_modules: number of modules K, at most the number of samples and of units.
        method: "iterd", the name of a baseline ("k-means", "spectral", ...), or an estimator, of which a
            copy is fitted.
        random_state: seed of everything random in the method.
        progress: show a progress bar, if the method has one.
        **settings: further settings of the method, such as `n_kicks=20` for IterD.

    Returns:
        The modules, with the method, its settings and the source of the activations in `source`.

    Raises:
        InputError: an unknown method or setting, or a K that cannot be.

    Example:
        >>> import pandas as pd
        >>> rng = np.random.default_rng(0)
        >>> topics = np.repeat([0, 1], 10)
        >>> X = rng.random((20, 6)) + 3 * (topics[:, None] == np.repeat([0, 1], 3))
        >>> acts = UnitActivations(
        ...     X.astype(np.float32),
        ...     pd.DataFrame({"text": np.where(topics, "a poem", "def main"), "n_tokens": 2}),
        ...     pd.DataFrame({"layer": 0, "kind": "neuron", "index": range(6),
        ...                   "hook_name": "blocks.0.mlp.hook_post", "label": [f"L0N{i}" for i in range(6)]}),
        ...     {"model": "planted"},
        ... )
        >>> modules = find_modules(acts, 2, progress=False)
        >>> sorted(modules.words(1)), sorted(modules.n_samples.tolist())
        ([['def'], ['poem']], [10, 10])
    """
    cure = "A module needs a sample and a unit at least."
    n_modules = check_integer("n_modules", n_modules, least=2, most=min(acts.X.shape), cure=cure)
    settings = {"n_modules": n_modules, "random_state": random_state, **settings}
    estimator = _estimator(method)
    known = estimator.get_params()
    if "verbose" in known:
        settings.setdefault("verbose", progress)
    for name in settings:
        if name not in known:
            close = nearest(name, known) or sorted(known)
            refuse("settings", got=f"{name}=", want=f"a setting of {type(estimator).__name__}: {close}")
    return Modules.from_estimator(estimator.set_params(**settings).fit(acts.X), acts)


def _estimator(method: Any) -> Any:
    """An unfitted estimator by name, or a copy of the one given."""
    if isinstance(method, str):
        known = named_estimators()
        return known[check_choice("method", method, known)]
    if not all(hasattr(method, name) for name in ("fit", "get_params", "set_params")):
        refuse("method", got=repr(method), want="the name of a method or a scikit-learn estimator")
    from sklearn.base import clone

    return clone(method)
