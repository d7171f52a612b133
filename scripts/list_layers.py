"""Write the catalogue into the README's table and the page of layers: `python scripts/list_layers.py [--check]`.

With ``--check`` nothing is written, and a stale file is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results import ROOT, filled

from seqzoo.commands import cite
from seqzoo.layers import FAMILIES


def table() -> str:
    """A Markdown row for each layer, by family."""
    lines = ["| layer | family | paper | numbers in a sequence's state | operators |", "|---|---|---|---|---|"]
    for family, layers in FAMILIES.items():
        for layer in layers:
            _, paper, link = cite(layer)
            operators = ", ".join(f"`{name}`" for name in layer.operators)
            lines.append(f"| `{layer.__name__}` | {family} | [{paper}]({link}) | {layer.state_formula} | {operators} |")
    return "\n".join(lines)


def page() -> str:
    """The page of the documentation: what each layer says of itself."""
    lines = ["# Layers"]
    for family, layers in FAMILIES.items():
        lines += ["", f"## {family.capitalize()}", "", *(f"::: seqzoo.layers.{layer.__name__}" for layer in layers)]
    return "\n".join(lines) + "\n"


def written() -> dict[Path, str]:
    """What each file should hold."""
    readme = ROOT / "README.md"
    text = filled(readme, "layers: scripts/list_layers.py", table())
    return {readme: text, ROOT / "docs" / "layers.md": page()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a file is stale, and write nothing")
    check = parser.parse_args().check
    stale = {path: text for path, text in written().items() if path.read_text() != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'stale; run python scripts/list_layers.py' if check else 'written'}")
        if not check:
            path.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
