"""Word pairs in 15 relations at several layers of SmolLM2, on held-out words, before and after LDA.

    python benchmarks/crystals.py [--layers 0 6 12 18 24 29] [--before "The word is "]
        [--write docs/geometry.md] [--picture crystals.png]

The last token of each word, residual stream after the layer, and the embedding. 740 pairs, about half held
out, no word in both halves. Takes a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from documents import replace_between, table_of
from instructions import model

from tl_modules.geometry.crystals import MEASURES, Crystals, crystal_table
from tl_modules.geometry.word_pairs import load_word_pairs


def by_layer(found: Crystals) -> str:
    heads = ["where", "measure", "as they are", "shuffled pairs", "projected", "random subspace"]
    heads += ["projected, shuffled", "p (random)"]
    rows = [
        [
            row["hook_name"],
            row["measure"],
            *(
                f"{row[kind]:.3f}"
                for kind in ("raw", "raw, shuffled", "signal", "random", "signal, shuffled")
            ),
            f"{row['p_random']:.2f}",
        ]
        for row in found.summary().to_dict("records")
    ]
    return table_of(heads, rows)


def fits(found: Crystals) -> str:
    heads = [
        "where",
        "top coordinate",
        "silhouette, raw",
        "LDA, held out",
        "LDA, in sample",
        "R² of PC 1 on length",
        "after LDA",
    ]
    names = [
        "top_coordinate",
        "silhouette_raw",
        "silhouette_signal",
        "silhouette_in_sample",
        "length_r2",
        "signal_length_r2",
    ]
    rows = [
        [row["hook_name"], *(f"{row[name]:.3f}" for name in names)] for row in found.fits.to_dict("records")
    ]
    return table_of(heads, rows)


def by_relation(found: Crystals, hook_name: str) -> str:
    columns = {
        (measure, kind): found.by_relation(measure, kind)[hook_name]
        for measure in MEASURES[1:]
        for kind in ("raw", "signal")
    }
    table = pd.DataFrame(columns)
    heads = ["relation", *(f"{measure}, {kind}" for measure, kind in table.columns)]
    return table_of(heads, [[name, *(f"{value:.2f}" for value in row)] for name, row in table.iterrows()])


def main() -> None:
    options = parse()
    names = ["blocks.0.hook_resid_pre"] + [f"blocks.{layer}.hook_resid_post" for layer in options.layers]
    found = crystal_table(model(), load_word_pairs(), names, before=options.before, n_draws=options.n_draws)
    parts = [by_layer(found), fits(found), by_relation(found, names[len(names) // 2])]
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        replace_between(options.write, "crystals", text, title="Geometry")
    if options.picture:
        figure = found.plot().update_layout(paper_bgcolor="white", plot_bgcolor="white")
        figure.write_image(options.picture, width=1000, scale=1.5)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 6, 12, 18, 24, 29])
    parser.add_argument("--before", default="The word is ", help="text in front of each word; '' for none")
    parser.add_argument("--n-draws", type=int, default=19, help="random subspaces and shuffled pairings")
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
