"""Names of a package that are loaded on first touch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load(package: str, room_of: Mapping[str, str], name: str) -> Any:
    """What a package calls `name`, from the room that it is in.

    Raises:
        AttributeError: the package has no such name.

    Example:
        >>> load("tl_modules", {"objective": "objective"}, "objective").__name__
        'objective'
    """
    if name not in room_of:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{room_of[name]}"), name)
