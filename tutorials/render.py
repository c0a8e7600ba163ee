"""Run the tutorials and store them with their outputs; figures as pictures, so that any viewer shows them.

    python tutorials/render.py [NOTEBOOK ...]

Needs the extra `image` (kaleido) and a Chrome or Chromium. A reader who runs a notebook gets live figures.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly
from nbclient import NotebookClient

HERE = Path(__file__).parent
FIGURE = "application/vnd.plotly.v1+json"
CIRCUIT = 'class="tlm tlm-circuit"'
WIDTH, SCALE = 1000, 1.5
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DRAWN_MS = 8000
TELL_HEIGHT = """<script>addEventListener("load", () => setTimeout(() => {
    document.title = Math.ceil(document.body.getBoundingClientRect().bottom) + 8; }, 4000));</script>"""


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
    elif CIRCUIT in data.get("text/html", ""):
        png = photograph(data["text/html"])
    else:
        return output
    output["data"] = nbformat.NotebookNode({"image/png": base64.b64encode(png).decode()})
    return output


def photograph(html: str) -> bytes:
    """What a browser makes of a cell's HTML; plotly.js may have come with an earlier cell."""
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder, "page.html"), Path(folder, "page.png")
        script = f"<script>{plotly.offline.get_plotlyjs()}</script>{TELL_HEIGHT}"
        page.write_text(f"<!doctype html><meta charset=utf-8>{script}{html}", encoding="utf-8")
        title = re.search(r"<title>(\d+)</title>", browse(page, 800, "--dump-dom"))
        if title is None:
            raise RuntimeError("the browser did not tell the page's height")
        browse(page, int(title[1]), f"--screenshot={picture}", "--force-device-scale-factor=1.2")
        return picture.read_bytes()


def browse(page: Path, height: int, *options: str) -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    always = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    size = [f"--window-size={WIDTH + 16},{height}", f"--virtual-time-budget={DRAWN_MS}"]
    command = [browser, *always, *size, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


if __name__ == "__main__":
    main()
