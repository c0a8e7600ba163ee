"""Results as folders: tables as Parquet, arrays as .npy, everything else in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_modules import _store
from tl_modules._checks import FileFormatError, refuse

FORMAT_VERSION = 1


def save_result(
    path: str | Path,
    kind: str,
    *,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, np.ndarray] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder, whole or not at all; replaces an older one of the same kind.

    Args:
        path: where the folder goes.
        kind: name of the format, as "tl-modules/galaxy".
        tables: by name.
        arrays: by name.
        facts: JSON values.

    Raises:
        InputError: `path` holds something else, or a table has a column of mixed types.
    """

    def fill(folder: Path) -> dict[str, Any]:
        for name, table in tables.items():
            _write(folder, name, table)
        for name, array in (arrays or {}).items():
            _store.write_array(folder / f"{name}.npy", array)
        return {"tables": list(tables), "arrays": list(arrays or {}), "facts": dict(facts or {})}

    _store.write_folder(Path(path), kind, FORMAT_VERSION, fill)


def _write(folder: Path, name: str, table: pd.DataFrame) -> None:
    import pyarrow

    try:
        _store.write_table(folder / f"{name}.parquet", table)
    except pyarrow.ArrowException as error:
        refuse(name, got=f"a table that Parquet cannot hold ({error})", want="one type in each column")


def load_result(
    path: str | Path, kind: str
) -> tuple[dict[str, pd.DataFrame], dict[str, np.ndarray], dict[str, Any]]:
    """Tables, arrays and facts of a folder that `save_result` wrote.

    Raises:
        FileFormatError: not such a folder, or a part is missing, truncated or corrupted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_result(folder, "tl-modules/example", tables={}, arrays={"one": np.eye(1)})
        ...     load_result(folder, "tl-modules/example")
        ({}, {'one': array([[1.]])}, {})
    """
    folder = Path(path)
    manifest = _store.read_manifest(folder, kind, FORMAT_VERSION)
    _store.check_parts(folder, manifest, contents=True)
    try:
        tables = {name: _store.read_table(folder / f"{name}.parquet") for name in manifest["tables"]}
        arrays = {name: _store.read_array(folder / f"{name}.npy") for name in manifest["arrays"]}
        return tables, arrays, dict(manifest["facts"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / _store.MANIFEST}: incomplete ({error!r})") from error
