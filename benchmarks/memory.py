"""Resident memory of this process, as Linux tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(field: str = "VmRSS") -> int:
    """Bytes held now (VmRSS), or their peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def peak_beyond(work: Callable[[], Any]) -> tuple[Any, int]:
    """What the work returns, and by how many bytes memory rose above what was held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident()
    result = work()
    return result, resident("VmHWM") - before
