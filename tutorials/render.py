"""Run the tutorials and store them with their outputs; figures as pictures, so that any viewer shows them.

    python tutorials/render.py

Needs the extra `image` (kaleido) and a Chrome or Chromium. A reader who runs a notebook gets live figures.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LIVE = ("application/vnd.plotly.v1+json", "text/html")


def main() -> None:
    os.environ["PLOTLY_RENDERER"] = "png+plotly_mimetype"
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [keep_picture(out) for out in cell.outputs if out.get("name") != "stderr"]
        nbformat.write(notebook, path)
        print(path.name, f"{path.stat().st_size / 1e3:.0f} kB")


def keep_picture(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A figure without its five megabytes of JavaScript."""
    data = output.get("data", {})
    if "image/png" in data:
        for kind in LIVE:
            data.pop(kind, None)
    return output


if __name__ == "__main__":
    main()
