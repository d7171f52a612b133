"""The site's first page is README.md, its links seen from the folder docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What mkdocs calls for each page."""
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text()
    elif page.file.src_uri == "contributing.md":
        markdown = (ROOT / "CONTRIBUTING.md").read_text()
    return markdown.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")
