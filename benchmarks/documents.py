"""Tables in Markdown, and the places in documents where a script writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table_of(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def replace_between(path: Path, name: str, text: str, *, title: str) -> None:
    """Put the text between the two markers of this name, which are added at the end if they are missing."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    old = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    if begin not in old:
        old += f"\n## {name.capitalize()}\n\n{begin}{end}"
    before, _, rest = old.partition(begin)
    path.write_text(before + begin + text.rstrip() + "\n" + end + rest.partition(end)[2], encoding="utf-8")
