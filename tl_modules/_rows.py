"""Where collected rows go: a matrix in memory, or a file that a killed run can take up again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_modules import _store
from tl_modules._checks import FileFormatError, refuse
from tl_modules.activations import FORMAT, FORMAT_VERSION, UnitActivations
from tl_modules.batches import Batch

_SETTINGS = ".collecting.json"
_JOURNAL = ".collecting.log"
_PART = "tl-modules/collecting"
_PART_VERSION = 1


class RowsInMemory:
    """A preallocated float32 matrix [sample, unit]."""

    def __init__(self, n_samples: int, n_units: int, source: Mapping[str, Any]) -> None:
        self._X = np.empty((n_samples, n_units), np.float32)
        self._source = source

    def has(self, number: int, batch: Batch) -> bool:  # noqa: ARG002 - part of `Rows`
        """No run came before."""
        return False

    def put(self, number: int, batch: Batch, values: Float[np.ndarray, "batch unit"]) -> None:  # noqa: ARG002
        """Write rows into the matrix."""
        for sample, sequence in batch.rows:
            self._X[sample] = values[sequence]

    def finish(self, samples: pd.DataFrame, units: pd.DataFrame) -> UnitActivations:
        """The matrix with its tables."""
        return UnitActivations(self._X, samples, units, self._source)


class RowsOnDisk:
    """A folder that becomes one `UnitActivations.load` reads.

    The rows are written into their place in `X.npy`, then a line `batch checksum` is added to a journal. A
    batch counts as done only if the rows in the file have that checksum, so a kill at any moment costs one
    batch at most. The folder has no manifest, and `load` refuses it, until all is there.

    Raises:
        FileFormatError: the folder is foreign, was made with other settings, or its parts do not fit.
    """

    def __init__(self, folder: Path, n_samples: int, n_units: int, source: Mapping[str, Any]) -> None:
        self._folder, self._source = folder, source
        self._shape = (n_samples, n_units)
        if folder.exists() and not folder.is_dir():
            raise FileFormatError(f"{folder}: not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _SETTINGS).exists():
            self._claim()
        manifest = _store.read_manifest(folder, _PART, _PART_VERSION, name=_SETTINGS)
        refuse_other_settings(folder, manifest["source"], source)
        self._done = self._read_journal()
        if not self._done and not (folder / "X.npy").exists():
            self._preallocate()
        self._first = self._first_row()

    def _claim(self) -> None:
        if any(self._folder.iterdir()):
            raise FileFormatError(
                f"{self._folder}: holds files that collect did not write; choose a new folder"
            )
        head = {"format": _PART, "format_version": _PART_VERSION, "source": self._source}
        _store.write_json(self._folder / _SETTINGS, head)

    def _preallocate(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": self._shape}
        with _store.aside(self._folder / "X.npy") as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 4 * self._shape[0] * self._shape[1])

    def _first_row(self) -> int:
        """Bytes before the first row, once the file is known to be as it was left."""
        matrix = _store.read_array(self._folder / "X.npy", mmap=True)
        if matrix.shape != self._shape or matrix.dtype != np.float32 or not isinstance(matrix, np.memmap):
            found = f"{matrix.dtype} of shape {matrix.shape}"
            raise FileFormatError(f"{self._folder / 'X.npy'}: {found}, expected float32 of {self._shape}")
        return int(matrix.offset)

    def _read_journal(self) -> dict[int, int]:
        path = self._folder / _JOURNAL
        lines = path.read_text(encoding="ascii", errors="replace").splitlines() if path.exists() else []
        pairs = [line.split() for line in lines]
        return {int(p[0]): int(p[1]) for p in pairs if len(p) == 2 and p[0].isdecimal() and p[1].isdecimal()}

    def _place(self, row: int) -> int:
        return self._first + 4 * self._shape[1] * row

    def has(self, number: int, batch: Batch) -> bool:
        """Whether the journal names this batch and its rows have the checksum noted there."""
        if number not in self._done:
            return False
        value = 0
        with (self._folder / "X.npy").open("rb") as file:
            for sample, _ in batch.rows:
                file.seek(self._place(sample))
                value = zlib.crc32(file.read(4 * self._shape[1]), value)
        return value == self._done[number]

    def put(self, number: int, batch: Batch, values: Float[np.ndarray, "batch unit"]) -> None:
        """Write rows into the file, then note them in the journal."""
        value = 0
        with (self._folder / "X.npy").open("r+b") as file:
            for sample, sequence in batch.rows:
                data = values[sequence].astype("<f4", copy=False).tobytes()
                file.seek(self._place(sample))
                file.write(data)
                value = zlib.crc32(data, value)
        with (self._folder / _JOURNAL).open("a", encoding="ascii") as journal:
            journal.write(f"\n{number} {value}\n")

    def finish(self, samples: pd.DataFrame, units: pd.DataFrame) -> UnitActivations:
        """Add the tables and the manifest; the matrix stays on disk, memory-mapped."""
        X = _store.read_array(self._folder / "X.npy", mmap=True)
        acts = UnitActivations(X, samples, units, self._source)
        _store.seal(self._folder, FORMAT, FORMAT_VERSION, acts.describe_parts(self._folder))
        for name in (_SETTINGS, _JOURNAL):
            (self._folder / name).unlink(missing_ok=True)
        return acts


Rows = RowsInMemory | RowsOnDisk


def finished(folder: Path, source: Mapping[str, Any]) -> UnitActivations | None:
    """The result that an earlier run with the same settings has left in `folder`, or None.

    Raises:
        InputError: the result there was made with other settings.
        FileFormatError: the folder is foreign or damaged.
    """
    if not (folder / _store.MANIFEST).exists():
        return None
    acts = UnitActivations.load(folder)
    refuse_other_settings(folder, acts.source, source)
    return acts


def refuse_other_settings(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a store made from another model, other prompts or other settings; name what differs."""
    here = json.loads(json.dumps(here))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        got = "; ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} here" for name in names)
        cure = "Choose a new folder, or repeat the settings."
        refuse("store", got=f"{folder}, made with {got}", want="one made with these settings", cure=cure)
