"""At which positions an intervention acts: counted from the start of the sequence, cached tokens included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_modules._checks import InputError, refuse

Positions = int | slice | Sequence[int] | str | None
"""None for all, "last"; negative numbers count from the end of each row."""
Lengths = Sequence[int] | Int[Tensor, " batch"] | None
"""Tokens of each row of a right-padded batch; None where there is no padding."""

SCORES = "blocks.0.attn.hook_attn_scores"
"""Where a forward pass shows how many tokens came before it: more keys than queries."""


class Where:
    """Positions as the user named them, as a mask for each forward pass.

    Args:
        model: whose attention window matters: caches forget what lies before it.
        positions: see `Positions`.
        lengths: see `Lengths`.

    Raises:
        InputError: positions of another kind, or none.
    """

    def __init__(self, model: Any, positions: Positions = None, lengths: Lengths = None) -> None:
        self.everywhere = positions is None
        self._positions = _checked(positions)
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self._window = _window_of(model)
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._seen = 0
        self._asked = self._met = False
        self.offset = 0
        """Tokens before this forward pass that are in the cache."""

    def look(self, scores: Float[Tensor, "batch head query key"]) -> None:
        """Note the offset of this forward pass, from the attention scores of the first layer."""
        queries, keys = scores.shape[-2:]
        if self._window and queries < keys and keys - queries >= self._window - 1:
            self.offset = self._seen
        else:
            self.offset = keys - queries
        self._seen = self.offset + queries

    def mask(self, n_rows: int, n_pos: int) -> Bool[Tensor, "batch pos"]:
        """Which positions of this forward pass are meant."""
        key = (n_rows, n_pos, self.offset)
        if key not in self._masks:
            self._masks.clear()
            self._masks[key] = self._new_mask(*key)
        return self._masks[key]

    def _new_mask(self, n_rows: int, n_pos: int, offset: int) -> Bool[Tensor, "batch pos"]:
        self.check_lengths(n_rows)
        ends = [offset + n_pos] * n_rows if self.lengths is None else self.lengths.tolist()
        mask = torch.zeros(n_rows, max(offset + n_pos, *ends), dtype=torch.bool)
        for row, end in enumerate(ends):
            mask[row, self._in_row(end)] = True
        mask = mask[:, offset : offset + n_pos]
        self._asked, self._met = True, self._met or bool(mask.any())
        return mask

    def check_met(self) -> None:
        """Refuse positions that no row of any forward pass had.

        Raises:
            InputError: there were forward passes, and none was changed anywhere.
        """
        if self._asked and not self._met:
            refuse("positions", got=self._positions, want="some that the prompts have")

    def check_lengths(self, n_rows: int) -> None:
        """Refuse lengths that do not fit the batch.

        Raises:
            InputError: there are more or fewer than rows.
        """
        if self.lengths is not None and len(self.lengths) != n_rows:
            raise InputError(f"lengths: got {len(self.lengths)}, expected {n_rows}, one for each row.")

    def _in_row(self, end: int) -> list[int]:
        """The positions that are meant in a row that ends before `end`, those that are there."""
        if isinstance(self._positions, slice):
            return list(range(end))[self._positions]
        counted = [position + end if position < 0 else position for position in self._positions]
        return [position for position in counted if 0 <= position < end]


def _window_of(model: Any) -> int | None:
    """How far local attention sees, which is also how much of it some caches keep; None without any."""
    configs = [model.cfg, getattr(getattr(model, "original_model", None), "config", None)]
    sizes = [getattr(config, name, None) for config in configs for name in ("sliding_window", "window_size")]
    return next((int(size) for size in sizes if size), None)


def _checked(positions: Positions) -> slice | list[int]:
    if positions is None:
        return slice(None)
    if isinstance(positions, slice):
        return positions
    if isinstance(positions, str):
        if positions != "last":
            refuse("positions", got=repr(positions), want="a number, a list, a slice or 'last'")
        return [-1]
    listed = [positions] if isinstance(positions, int) else [int(position) for position in positions]
    if not listed:
        refuse("positions", got="no position", want="at least one, or None for all")
    return listed
