"""What a unit is: where its values are read, and its directions in the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_modules._checks import check_choice, check_integer, refuse
from tl_modules.host import (
    describe,
    mlp_read_gain,
    mlp_read_matrices,
    mlp_write_gain,
    mlp_write_matrix,
    require_mlp,
)


class Basis(ABC):
    """One kind of unit in some layers of a model. Columns of X are layer by layer, index by index.

    A subclass says which hook point each layer is read at, how many units it has there and what they are
    called, how an activation becomes unit values, and their directions.
    """

    kind: str
    """Plural name, as given to `collect(basis=...)`."""
    unit_kind: str
    """Singular name, as written in the units table."""
    letter: str
    """What stands between layer and index in a label: L3N17."""

    def __init__(self, layers: Iterable[int] | None = None) -> None:
        """Choose layers by number, negative ones counted from the last; None for all layers."""
        self._layers = None if layers is None else list(layers)

    def layers(self, model: Any) -> list[int]:
        """The chosen layers of this model, in ascending order.

        Raises:
            InputError: a layer that the model does not have, the same one twice, or none.
        """
        n_layers = describe(model).n_layers
        if self._layers is None:
            return list(range(n_layers))
        checked = [
            check_integer("layers", layer, least=-n_layers, most=n_layers - 1) for layer in self._layers
        ]
        chosen = sorted(layer % n_layers for layer in checked)
        if not chosen or len(set(chosen)) < len(chosen):
            refuse("layers", got=self._layers, want="at least one layer, each named once")
        return chosen

    def hook_names(self, model: Any) -> list[str]:
        """The hook point of each chosen layer, in the order of the columns."""
        return [self.hook_name(layer) for layer in self.layers(model)]

    def units(self, model: Any) -> pd.DataFrame:
        """The table of units, one row for each column of X.

        Returns:
            Columns `layer`, `kind`, `index` (within the layer), `hook_name` and `label`.
        """
        layers = self.layers(model)
        sizes = [self.n_units(model, layer) for layer in layers]
        layer_of, index = np.repeat(layers, sizes), np.concatenate([np.arange(size) for size in sizes])
        return pd.DataFrame(
            {
                "layer": layer_of,
                "kind": self.unit_kind,
                "index": index,
                "hook_name": np.repeat([self.hook_name(layer) for layer in layers], sizes),
                "label": [f"L{a}{self.letter}{b}" for a, b in zip(layer_of, index, strict=True)],
            }
        )

    @abstractmethod
    def hook_name(self, layer: int) -> str:
        """The hook point at which a layer's units are read."""

    @abstractmethod
    def n_units(self, model: Any, layer: int) -> int:
        """How many units a layer has."""

    @abstractmethod
    def values(
        self, hook_name: str, activation: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "batch pos unit"]:
        """The units' values, from the activation at their hook point."""

    @abstractmethod
    def read_directions(self, model: Any, layer: int) -> Float[Tensor, "unit d_model"]:
        """For each unit, the direction of the residual stream that excites it."""

    @abstractmethod
    def write_directions(self, model: Any, layer: int) -> Float[Tensor, "unit d_model"]:
        """For each unit, what a value of 1 adds to the residual stream."""


class NeuronBasis(Basis):
    """MLP neurons, read at `mlp.hook_post`, where they multiply the rows of `W_out`.

    In a gated MLP that is act(gate) * up, and its sign carries meaning.

    Args:
        layers: which layers; None for all.

    Example:
        >>> NeuronBasis(layers=[3]).hook_name(3)
        'blocks.3.mlp.hook_post'
    """

    kind = "neurons"
    unit_kind = "neuron"
    letter = "N"

    def hook_name(self, layer: int) -> str:
        """`blocks.{layer}.mlp.hook_post`, in both kinds of model."""
        return f"blocks.{layer}.mlp.hook_post"

    def layers(self, model: Any) -> list[int]:
        """The chosen layers of this model, in ascending order.

        Raises:
            InputError: a layer that the model does not have, the same one twice, or none.
            UnsupportedModelError: no ordinary MLP in every layer.
        """
        require_mlp(describe(model))
        return super().layers(model)

    def n_units(self, model: Any, layer: int) -> int:
        """The MLP's width."""
        return int(mlp_write_matrix(model, layer).shape[0])

    def values(
        self,
        hook_name: str,  # noqa: ARG002 - the same at every hook point
        activation: Float[Tensor, "batch pos unit"],
    ) -> Float[Tensor, "batch pos unit"]:
        """The activation itself."""
        return activation

    def read_directions(
        self, model: Any, layer: int, *, matrix: str | None = None
    ) -> Float[Tensor, "unit d_model"]:
        """What excites each neuron: its input weights, seen through the frozen norm before the MLP.

        The norm's gain is multiplied in, and LayerNorm's removal of the mean is applied, so that the
        directions are the same whether the norm was folded into the weights or not. The norm's division by
        the size of the residual stream, one positive number a position, is left out.

        Args:
            model: a HookedTransformer or TransformerBridge.
            layer: the layer.
            matrix: "W_gate" or "W_in" of a gated MLP; the default is W_gate, which decides whether a neuron
                is on at all. "W_in" of an MLP without gate.

        Raises:
            InputError: a matrix that the model does not have.
        """
        matrices = mlp_read_matrices(model, layer)
        default = "W_gate" if "W_gate" in matrices else "W_in"
        weights = matrices[check_choice("matrix", matrix or default, matrices)]
        directions = weights.T * mlp_read_gain(model, layer)
        if describe(model).normalization == "LN":
            directions = directions - directions.mean(dim=-1, keepdim=True)
        return directions

    def write_directions(self, model: Any, layer: int) -> Float[Tensor, "unit d_model"]:
        """What a value of 1 writes: the rows of `W_out`, times the gain of the norm after the MLP, if any.

        Behind such a norm (Gemma 2 and 3, OLMo 2) the sum of all writes is also divided by its root mean
        square, one positive number a position. It is left out: directions are exact, lengths are relative.
        """
        return mlp_write_matrix(model, layer) * mlp_write_gain(model, layer)


_BASES: dict[str, type[Basis]] = {"neurons": NeuronBasis}


def as_basis(basis: str | Basis) -> Basis:
    """A basis from its name, or the basis itself.

    Raises:
        InputError: no such basis.

    Example:
        >>> as_basis("neurons").kind
        'neurons'
    """
    if isinstance(basis, Basis):
        return basis
    return _BASES[check_choice("basis", basis, _BASES)]()
