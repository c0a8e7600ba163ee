"""The picture in docs/circuits.md: the circuit of a fact in SmolLM2, drawn by `CircuitView.plot`.

    python benchmarks/circuit_picture.py docs/circuit.png

Needs the extra `image` (kaleido) and a Chrome or Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tl_modules as tlm


def main(path: Path) -> None:
    model = tlm.load_demo_model()
    modules = tlm.find_modules(tlm.collect(model, tlm.load_demo_prompts()), n_modules=10, random_state=0)
    view = tlm.circuit(model, modules, "The capital of France is", " Paris", n_heads=14)
    view.verify()
    figure = view.plot().figure()
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    figure.write_image(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
