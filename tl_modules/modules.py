"""`Modules`: a decomposition joined to its tables, and what can be said of each module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly
from jaxtyping import Float, Int

from tl_modules import _modules_io
from tl_modules._checks import FileFormatError, InputError, check_integer, refuse
from tl_modules._module_facts import (
    ShareOf,
    block_table,
    check_labels,
    check_same_units,
    cross_table,
    peaks,
    source_of,
    statistics,
)
from tl_modules.activations import UnitActivations
from tl_modules.objective import Objective, module_counts
from tl_modules.standardize import Standardization
from tl_modules.sums import module_means
from tl_modules.words import topic_words

_MOST_WORDS = 20
_NAME_WORDS = 3
_STORED_ARRAYS = ("unit_labels", "sample_labels", "heat_map", "sample_scores", "unit_strengths")
_STORED_TABLES = ("units", "samples", "history")


@dataclass(frozen=True, eq=False, repr=False)
class Modules:
    """A decomposition of units and samples into modules, with the tables that say what they are.

    Made by `find_modules`. `modules[3]` is one `Module`; iterating gives all of them. A label of -1 means
    that a unit or sample was left out. All means are of z-scores with the statistics of `standardization`.

    Args:
        unit_labels: module of each unit, -1 if left out.
        sample_labels: module of each sample, -1 if left out.
        units: one row a unit: layer, kind, index, hook_name, label.
        samples: one row a sample: text, n_tokens, and category if known (which the method never saw).
        heat_map: mean over the samples of module i (rows) and the units of module j (columns).
        sample_scores: mean of each sample over each module's units.
        unit_strengths: mean of each unit over its module's samples minus that over the other modules'
            samples; nan for a unit that was left out.
        objective: the parts xi, H, L and beta of what the decomposition is worth.
        history: the objective by iteration; empty for methods without one.
        converged: whether the method ended by itself.
        standardization: mean and scale of each unit.
        source: method, settings, seed, package version and the source of the activations; JSON-able.
        given_names: names that replace those made from words, by module.

    Raises:
        InputError: arrays and tables do not fit together.
    """

    unit_labels: Int[np.ndarray, " unit"]
    sample_labels: Int[np.ndarray, " sample"]
    units: pd.DataFrame
    samples: pd.DataFrame
    heat_map: Float[np.ndarray, "module module"]
    sample_scores: Float[np.ndarray, "sample module"]
    unit_strengths: Float[np.ndarray, " unit"]
    objective: Objective
    history: pd.DataFrame
    converged: bool
    standardization: Standardization
    source: Mapping[str, Any]
    given_names: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_samples, n_units, n_modules = len(self.sample_labels), len(self.unit_labels), len(self.heat_map)
        wanted: dict[str, tuple[Any, int]] = {
            "units": (self.units, n_units),
            "samples": (self.samples, n_samples),
            "unit_strengths": (self.unit_strengths, n_units),
            "standardization": (self.standardization.mean, n_units),
        }
        for name, (value, n) in wanted.items():
            if len(value) != n:
                refuse(name, got=f"{len(value)} rows", want=f"{n} rows, as many as labels")
        if self.sample_scores.shape != (n_samples, n_modules):
            refuse("sample_scores", got=f"shape {self.sample_scores.shape}", want=f"{n_samples, n_modules}")
        check_labels("unit_labels", self.unit_labels, n_modules)
        check_labels("sample_labels", self.sample_labels, n_modules)

    @classmethod
    def from_estimator(cls, estimator: Any, acts: UnitActivations) -> Modules:
        """Join the labels of a fitted estimator to the tables of the activations it was fitted on.

        Reads the matrix once, for block means, scores and strengths together.

        Args:
            estimator: anything with the fitted attributes of `IterD`.
            acts: the activations that the estimator was fitted on.

        Raises:
            InputError: the estimator is not fitted, or was fitted on a matrix of another shape.
        """
        if not hasattr(estimator, "unit_labels_"):
            refuse("estimator", got=type(estimator).__name__, want="a fitted one", cure="Call fit first.")
        unit_labels = np.array(estimator.unit_labels_, dtype=np.int64)
        sample_labels = np.array(estimator.sample_labels_, dtype=np.int64)
        if (len(sample_labels), len(unit_labels)) != acts.X.shape:
            fitted = f"labels for {len(sample_labels)} samples and {len(unit_labels)} units"
            refuse("estimator", got=fitted, want=f"one fitted on these activations, {acts.X.shape}")
        largest = 1 + int(max(unit_labels.max(), sample_labels.max()))
        n_modules = max(int(getattr(estimator, "n_modules", 0)), largest)
        history = estimator.history_
        return cls(
            unit_labels=unit_labels,
            sample_labels=sample_labels,
            units=acts.units.reset_index(drop=True),
            samples=acts.samples.reset_index(drop=True),
            **statistics(acts.X, sample_labels, unit_labels, n_modules, estimator.standardization_),
            objective=Objective(*map(float, estimator.objective_parts_)),
            history=history.reset_index(drop=True),
            converged=bool(estimator.converged_),
            standardization=Standardization(*(np.array(a, np.float64) for a in estimator.standardization_)),
            source=source_of(estimator, acts),
        )

    @property
    def n_modules(self) -> int:
        """Number of modules, K."""
        return len(self.heat_map)

    @cached_property
    def n_units(self) -> Int[np.ndarray, " module"]:
        """Units in each module."""
        return module_counts(self.unit_labels, self.n_modules)

    @cached_property
    def n_samples(self) -> Int[np.ndarray, " module"]:
        """Samples in each module."""
        return module_counts(self.sample_labels, self.n_modules)

    def __len__(self) -> int:
        return self.n_modules

    def __getitem__(self, index: int) -> Module:
        """Module number `index`; negative numbers count from the end.

        Raises:
            IndexError: there is no such module.
        """
        position = index + self.n_modules if index < 0 else index
        if not 0 <= position < self.n_modules:
            raise IndexError(f"module {index} of {self.n_modules}: numbers go from 0 to {self.n_modules - 1}")
        return Module(self, int(position))

    def __iter__(self) -> Iterator[Module]:
        return (Module(self, index) for index in range(self.n_modules))

    def blocks(self) -> pd.DataFrame:
        """How far each module stands out, one row a module, from the heat map; means of z-scores.

        Columns: mean_inside (its samples, its units), other_samples (its units, the other modules' samples),
        other_units (its samples, the other modules' units), mean_outside (these two together: the cells that
        share one side with the module, weighted by their number) and contrast (inside minus outside).
        """
        return block_table(self.heat_map, self.n_samples, self.n_units)

    def layer_profile(self, share_of: ShareOf = None) -> pd.DataFrame:
        """Units by module (rows) and layer (columns).

        Args:
            share_of: None counts units; "module" gives shares of each module's units (rows sum to 1),
                "layer" shares of each layer's units.
        """
        return cross_table(self.unit_labels, self.units["layer"], self.n_modules, share_of)

    def category_mix(self, share_of: ShareOf = None) -> pd.DataFrame | None:
        """Samples by module (rows) and category (columns); None where no category is known.

        Args:
            share_of: None counts samples; "module" gives shares of each module's samples with a category
                (rows sum to 1), "category" shares of each category's samples.
        """
        if "category" not in self.samples or self.samples["category"].isna().all():
            return None
        return cross_table(self.sample_labels, self.samples["category"], self.n_modules, share_of)

    def words(self, n: int = 8) -> list[list[str]]:
        """The `n` words (at most 20) that set each module's samples apart, best first: class-based TF-IDF.

        See `tl_modules.words.topic_words` for the score and for the words that are never used.
        """
        check_integer("n", n, least=1, most=_MOST_WORDS)
        return [ranked[:n] for ranked in self._ranked_words]

    @cached_property
    def _ranked_words(self) -> list[list[str]]:
        texts = list(self.samples["text"])
        return topic_words(texts, self.sample_labels, self.n_modules, n_words=_MOST_WORDS)

    @property
    def names(self) -> list[str]:
        """A short name for each module: the one given, else its first words, else its number."""
        made = [" · ".join(ranked) or f"module {k}" for k, ranked in enumerate(self.words(_NAME_WORDS))]
        return [self.given_names.get(k, name) for k, name in enumerate(made)]

    def renamed(self, names: Mapping[int, str]) -> Modules:
        """The same decomposition with names of your own for some modules.

        Raises:
            InputError: a number that is no module's.
        """
        for index in names:
            check_integer("names", index, least=0, most=self.n_modules - 1)
        return replace(self, given_names={**self.given_names, **{int(k): str(v) for k, v in names.items()}})

    def summary(self) -> pd.DataFrame:
        """One row a module: sizes, block means, the layers with most units, words and main category.

        Columns: module, name, n_units, n_samples, mean_inside, mean_outside, peak_layers, words; and where
        categories are known main_category and category_share (of the module's samples with a category).
        """
        blocks = self.blocks()
        table = pd.DataFrame(
            {
                "module": np.arange(self.n_modules),
                "name": self.names,
                "n_units": self.n_units,
                "n_samples": self.n_samples,
                "mean_inside": blocks["mean_inside"].to_numpy(),
                "mean_outside": blocks["mean_outside"].to_numpy(),
                "peak_layers": [peaks(row) for _, row in self.layer_profile().iterrows()],
                "words": [", ".join(ranked) for ranked in self.words()],
            }
        )
        mix = self.category_mix("module")
        if mix is not None:
            known = mix.sum(axis=1) > 0
            table["main_category"] = mix.idxmax(axis=1).where(known).to_numpy()
            table["category_share"] = mix.max(axis=1).to_numpy()
        return table

    def transform(self, acts: UnitActivations) -> Float[np.ndarray, "sample module"]:
        """Mean z-score of new samples over each module's units, with the statistics of the train samples.

        Raises:
            InputError: `acts` has other units, or the same in another order.
        """
        check_same_units(self.units, acts.units)
        return module_means(acts.X, self.unit_labels, self.n_modules, self.standardization)

    def predict(self, acts: UnitActivations) -> Int[np.ndarray, " sample"]:
        """The module with the largest score for each new sample; never a module without units.

        Raises:
            InputError: `acts` has other units, or the same in another order.
        """
        scores = np.where(self.n_units > 0, self.transform(acts), -np.inf)
        return np.asarray(np.argmax(scores, axis=1), dtype=np.int64)

    def plot(self) -> plotly.graph_objects.Figure:
        """One figure: heat map, layer profile and, where known, category mix, a row a module."""
        from tl_modules.viz import overview

        return overview(self)

    def report(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write one HTML file that opens offline; see `tl_modules.viz.write_report`."""
        from tl_modules.viz import write_report

        return write_report(self, path, title=title)

    def save(self, path: str | Path) -> None:
        """Write a folder (safetensors, Parquet, JSON), whole or not at all; replaces an older one.

        Raises:
            InputError: `path` holds something else.
        """
        arrays = {name: getattr(self, name) for name in _STORED_ARRAYS}
        arrays |= {"objective": np.array(self.objective), **self.standardization._asdict()}
        facts = {"converged": self.converged, "source": dict(self.source)}
        facts["given_names"] = {str(k): name for k, name in self.given_names.items()}
        tables = {name: getattr(self, name) for name in _STORED_TABLES}
        _modules_io.write_modules(Path(path), arrays, tables, facts)

    @classmethod
    def load(cls, path: str | Path) -> Modules:
        """Read a folder that `save` wrote.

        Raises:
            FileFormatError: not such a folder, or a part is missing, truncated, corrupted or does not fit.
        """
        arrays, tables, facts = _modules_io.read_modules(Path(path))
        try:
            stored: dict[str, Any] = {name: arrays[name] for name in _STORED_ARRAYS}
            stored |= {name: tables[name] for name in _STORED_TABLES}
            return cls(
                **stored,
                objective=Objective(*arrays["objective"].tolist()),
                standardization=Standardization(arrays["mean"], arrays["scale"]),
                converged=facts["converged"],
                source=facts["source"],
                given_names={int(k): name for k, name in facts["given_names"].items()},
            )
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: parts do not fit together: {error}") from error

    def __repr__(self) -> str:
        shape = f"{len(self.sample_labels)} samples × {len(self.unit_labels)} units"
        method = self.source.get("method", "unknown method")
        return f"Modules({self.n_modules} modules of {shape}, {method}, L={self.objective.L:.6g})"

    def _repr_html_(self) -> str:
        from tl_modules.viz import modules_html

        return modules_html(self)


@dataclass(frozen=True, eq=False, repr=False)
class Module:
    """One module: a group of units and the samples that drive it. A view, made by `modules[k]`."""

    modules: Modules
    index: int

    @property
    def name(self) -> str:
        """The module's name: the one given, else its first words."""
        return self.modules.names[self.index]

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.modules.n_units[self.index])

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return int(self.modules.n_samples[self.index])

    @property
    def block(self) -> pd.Series:
        """Its row of `Modules.blocks()`: mean_inside, mean_outside, contrast and their parts."""
        return self.modules.blocks().iloc[self.index]

    @cached_property
    def units(self) -> pd.DataFrame:
        """Its units, the strongest first, with the column strength; the index is the column of X.

        Strength is the unit's mean z-score over the module's samples minus that over the other modules'.
        """
        own = np.flatnonzero(self.modules.unit_labels == self.index)
        table = self.modules.units.iloc[own].assign(strength=self.modules.unit_strengths[own])
        return table.sort_values("strength", ascending=False, kind="stable")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Its samples, the best first, with the column score; the index is the row of X.

        Score is the sample's mean z-score over the module's units.
        """
        own = np.flatnonzero(self.modules.sample_labels == self.index)
        table = self.modules.samples.iloc[own].assign(score=self.modules.sample_scores[own, self.index])
        return table.sort_values("score", ascending=False, kind="stable")

    @property
    def scores(self) -> Float[np.ndarray, " sample"]:
        """Mean z-score of every sample over the module's units, its own samples or not."""
        return np.array(self.modules.sample_scores[:, self.index])

    def words(self, n: int = 8) -> list[str]:
        """The words that set its samples apart from the other modules', best first."""
        return self.modules.words(n)[self.index]

    def exemplars(self, n: int = 5) -> pd.DataFrame:
        """Its `n` samples with the highest scores."""
        return self.samples.head(check_integer("n", n, least=1))

    def layer_profile(self, share_of: ShareOf = None) -> pd.Series:
        """Its row of `Modules.layer_profile`: units by layer."""
        return self.modules.layer_profile(share_of).iloc[self.index]

    def category_mix(self, share_of: ShareOf = None) -> pd.Series | None:
        """Its row of `Modules.category_mix`: samples by category; None where none is known."""
        mix = self.modules.category_mix(share_of)
        return None if mix is None else mix.iloc[self.index]

    def __repr__(self) -> str:
        return f"Module({self.index}: {self.name}, {self.size} units, {self.n_samples} samples)"

    def _repr_html_(self) -> str:
        from tl_modules.viz import module_html

        return module_html(self)
