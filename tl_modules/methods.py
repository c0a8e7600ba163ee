"""Fit any decomposition method by its name: IterD and the baselines, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from tl_modules._checks import check_choice, check_integer, refuse
from tl_modules.activations import UnitActivations

PAPER_MODULES = (5, 10, 15, 20)
"""The numbers of modules in the paper's tables."""
Methods = Iterable[str] | Mapping[str, Any] | None


class Fit(NamedTuple):
    """One method, fitted."""

    method: str
    """Its name."""
    n_modules: int
    """Modules asked for."""
    estimator: Any
    """The fitted estimator."""
    seconds: float
    """Time that `fit` took."""


def fit_methods(
    acts: UnitActivations,
    n_modules: Sequence[int] = PAPER_MODULES,
    methods: Methods = None,
    *,
    random_state: int = 0,
    progress: bool = True,
) -> list[Fit]:
    """Fit each method with each number of modules on the same activations.

    Args:
        acts: activations to decompose.
        n_modules: numbers of modules.
        methods: names ("iterd", "k-means", ...), or estimators by name, of which copies are fitted; by
            default IterD and the five baselines.
        random_state: seed of every method.
        progress: show a progress bar.

    Returns:
        One `Fit` per number of modules and method, in that order.

    Raises:
        InputError: an unknown method, or a number of modules that does not fit; before anything is fitted.

    Example:
        >>> import numpy as np, pandas as pd
        >>> X = np.kron(np.eye(2), np.ones((6, 9))).astype(np.float32)
        >>> samples = pd.DataFrame({"text": np.repeat(["a poem", "def f"], 6), "n_tokens": 2})
        >>> units = pd.DataFrame({"layer": 0, "kind": "neuron", "index": range(18),
        ...                       "hook_name": "h", "label": ""})
        >>> acts = UnitActivations(X, samples, units, {})
        >>> [fit] = fit_methods(acts, [2], ["k-means"], progress=False)
        >>> fit.method, fit.estimator.unit_labels_.shape
        ('k-means', (18,))
    """
    from sklearn.base import clone

    counts = _checked_counts(n_modules, acts)
    estimators = named_estimators(methods)
    fits = []
    bar = tqdm([(count, name) for count in counts for name in estimators], desc="fit", disable=not progress)
    for count, name in bar:
        bar.set_postfix_str(f"{name}, {count} modules")
        estimator = clone(estimators[name]).set_params(n_modules=count, random_state=random_state)
        start = time.perf_counter()
        estimator.fit(acts.X)
        fits.append(Fit(name, count, estimator, time.perf_counter() - start))
    return fits


def named_estimators(methods: Methods = None) -> dict[str, Any]:
    """Unfitted estimators by name: those given, those named, or all.

    Raises:
        InputError: an unknown name, or something that is no estimator.

    Example:
        >>> list(named_estimators(["k-means", "spectral"]))
        ['k-means', 'spectral']
    """
    from tl_modules.baselines import BASELINES
    from tl_modules.iterd import IterD

    if isinstance(methods, Mapping):
        for name, estimator in methods.items():
            if not (hasattr(estimator, "fit") and hasattr(estimator, "set_params")):
                refuse(f"methods[{name!r}]", got=repr(estimator), want="a scikit-learn style estimator")
        return dict(methods)
    known: dict[str, Any] = {"iterd": IterD, **BASELINES}
    if isinstance(methods, str):
        cure = f"Put it in a list: [{methods!r}]."
        refuse("methods", got=repr(methods), want="a list of names, or estimators by name", cure=cure)
    names = list(known if methods is None else methods)
    return {check_choice("methods", name, known): known[name]() for name in names}


def _checked_counts(n_modules: Sequence[int], acts: UnitActivations) -> list[int]:
    counts = list(n_modules)
    if not counts:
        refuse("n_modules", got="nothing", want="at least one number of modules")
    cure = "A module needs a sample and a unit at least."
    return [check_integer("n_modules", count, least=2, most=min(acts.X.shape), cure=cure) for count in counts]
