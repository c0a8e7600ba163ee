"""Modules over neurons, heads, SAE features and transcoder features, on the same prompts.

    python benchmarks/bases.py [--n-modules 10] [--acts-cache FOLDER] [--write docs/bases_table.md]

SmolLM2-135M-Instruct, the labelled instructions of ../shared/data (2,100 to decompose, 700 to test on), mean
|a| over the words of each prompt in a chat, the SAEs and transcoders that the package ships. Prints, per basis: purity
of the modules' prompts, agreement with the categories and with the neurons' modules (adjusted Rand index of
the sample labels), xi, and accuracy of the paper's prediction protocol.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from instructions import DATA, model
from sklearn.metrics import adjusted_rand_score

from tl_modules import (
    Basis,
    HeadBasis,
    Modules,
    NeuronBasis,
    UnitActivations,
    collect,
    find_modules,
    predict_categories,
)
from tl_modules.demo_features import load_demo_features


def bases() -> dict[str, Basis]:
    found: dict[str, Basis] = {"neurons": NeuronBasis(), "heads": HeadBasis()}
    for kind in ("sae", "transcoder", "all"):
        found[f"features ({kind})"] = load_demo_features(kind)
    found["features (all) + heads"] = load_demo_features("all") + HeadBasis()
    layers = sorted(set(load_demo_features("sae").units(model())["layer"]))
    found["neurons, the SAEs' layers"] = NeuronBasis(layers)
    return found


def activations(name: str, basis: Basis, split: str, cache: Path | None) -> UnitActivations:
    prompts = pd.read_json(DATA / f"instructions_{split}.jsonl.gz", lines=True)[["text", "category"]]
    store = cache / f"{name}-{split}" if cache else None
    return collect(model(), prompts, basis, chat=True, store=store)


def purity(modules: Modules) -> float:
    """Share of prompts whose category is the commonest one of their module."""
    table = pd.crosstab(modules.sample_labels, modules.samples["category"])
    return float(table.max(axis=1).sum() / table.to_numpy().sum())


def main() -> None:
    options = parse()
    rows, neurons = [], None
    for name, basis in bases().items():
        train, test = (activations(name, basis, split, options.acts_cache) for split in ("train", "test"))
        modules = find_modules(train, options.n_modules, random_state=0, progress=False)
        neurons = modules if neurons is None else neurons
        table = predict_categories(train, test, [options.n_modules], ["iterd"], progress=False)
        accuracy = table.dropna(subset="n_modules").set_index("classifier")["accuracy"]
        kept = modules.unit_labels >= 0
        rows.append(
            {
                "basis": name,
                "units": f"{kept.sum():,} of {len(kept):,}",
                "non-zero": f"{100 * density(train):.1f} %",
                "xi": f"{modules.objective.xi:.3f}",
                "purity": f"{purity(modules):.3f}",
                "ARI with categories": f"{ari(modules, modules.samples['category']):.3f}",
                "ARI with neurons": f"{ari(modules, neurons.sample_labels):.3f}",
                "SVC / LR accuracy": f"{accuracy['svc']:.3f} / {accuracy['lr']:.3f}",
            }
        )
        print(rows[-1], flush=True)
    text = markdown(rows)
    print(text)
    if options.write:
        heading = f"Made by `python benchmarks/bases.py --n-modules {options.n_modules}`.\n\n"
        options.write.write_text(heading + text + "\n", encoding="utf-8")


def density(acts: UnitActivations) -> float:
    n_nonzero = acts.X.nnz if acts.is_sparse else np.count_nonzero(acts.X)
    return n_nonzero / (acts.n_samples * acts.n_units)


def ari(modules: Modules, other) -> float:
    return float(adjusted_rand_score(other, modules.sample_labels))


def markdown(rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n-modules", type=int, default=10)
    parser.add_argument(
        "--acts-cache", type=Path, help="folder to keep the activations in, and to reuse them"
    )
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
