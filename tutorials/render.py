"""Run the tutorials and store them with their outputs; figures as pictures, so that any viewer shows them.

    python tutorials/render.py [NOTEBOOK ...]

Needs the extra `image` (kaleido) and a Chrome or Chromium. A reader who runs a notebook gets live figures.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly
from nbclient import NotebookClient

HERE = Path(__file__).parent
FIGURE = "application/vnd.plotly.v1+json"
WIDTH, SCALE = 1000, 1.5


def main() -> None:
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    for path in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
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
    """A figure as a picture, without its five megabytes of JavaScript."""
    data = output.get("data", {})
    if FIGURE in data:
        figure = plotly.io.from_json(json.dumps(data.pop(FIGURE)), skip_invalid=True)
        png = figure.to_image("png", width=WIDTH, scale=SCALE)
        output["data"] = nbformat.NotebookNode({"image/png": base64.b64encode(png).decode()})
    return output


if __name__ == "__main__":
    main()
