"""The README's picture: what `make demo` finds, drawn by `Modules.plot`.

    python benchmarks/readme_picture.py docs/modules.png

Needs the extra `image` (kaleido) and a Chrome or Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tl_modules as tlm


def main(path: Path) -> None:
    acts = tlm.collect(tlm.load_demo_model(), tlm.load_demo_prompts())
    figure = tlm.find_modules(acts, n_modules=10, random_state=0).plot()
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    figure.write_image(path, width=1400, scale=1.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
