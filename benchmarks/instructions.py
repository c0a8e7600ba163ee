"""Activations of SmolLM2's neurons over the labelled instructions, collected once as the paper's code does.

Collecting takes about 6 minutes on 2 cores; a cache folder keeps the result for the next benchmark.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd

from tl_modules import UnitActivations, collect, load_demo_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@functools.cache
def model():
    return load_demo_model()


def activations(split: str, cache: Path | None) -> UnitActivations:
    """2,100 train or 700 test prompts x 46,080 neurons, mean |a| over all tokens."""
    folder = cache / split if cache else None
    if folder and (folder / "manifest.json").exists():
        return UnitActivations.load(folder)
    prompts = pd.read_json(DATA / f"instructions_{split}.jsonl.gz", lines=True)[["text", "category"]]
    return collect(model(), prompts, parity="paper", store=folder)
