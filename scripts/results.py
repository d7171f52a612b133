"""What benchmarks keep: measurements in small JSON files, and the text made of them between marks in Markdown files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "runs" / "bench"
DOCS = ROOT / "docs"


def read(path: Path) -> dict[str, Any]:
    """What ``path`` holds; nothing where it is not there yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, measured: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=1) + "\n")


def filled(path: Path, mark: str, text: str) -> str:
    """The words of the file ``path`` with ``text`` between ``<!-- mark -->`` and the next ``<!-- end -->``.

    Raises:
        ValueError: the file has not one such place.
    """
    begin, end = f"<!-- {mark} -->", "<!-- end -->"
    pattern = f"{re.escape(begin)}.*?{end}"
    words, found = re.subn(pattern, lambda _: f"{begin}\n{text}\n{end}", path.read_text(), flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{path} has {found} places for a text, {begin} ... {end}; expected 1")
    return words


def fill(results: Path, file: str, mark: str, text: str) -> None:
    """Put ``text`` into the project's ``file`` where the results are those of the documentation."""
    if results.resolve() == DOCS:
        path = ROOT / file
        path.write_text(filled(path, mark, text))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column reads from the left, numbers from the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdict(target: float, ratios: Mapping[str, tuple[float, float]]) -> str:
    """``target`` and whether it is met: each name's ratio must be what is needed, rounded as the tables print them."""
    missed = [name for name, (ratio, needed) in ratios.items() if round(ratio, 1) < needed]
    return f"{target:g}x: {' and '.join(missed) + ' missed' if missed else 'met'}"
