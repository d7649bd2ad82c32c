"""The sections of ``RESULTS.md``, each of which one benchmark writes anew."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["write_section"]


def write_section(path: Path, title: str, text: str) -> None:
    """Replace the section ``## title`` of a Markdown file, or append it."""
    content = path.read_text() if path.is_file() else "# Results\n\nWritten by the benchmarks of this folder.\n"
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(content):
        content = pattern.sub(lambda _: section + "\n", content)
    else:
        content = content.rstrip() + "\n\n" + section
    path.write_text(content.rstrip() + "\n")
