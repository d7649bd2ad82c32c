"""What benchmarks leave behind: sections of ``RESULTS.md``, and tables that an interrupted run goes on with."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["append_row", "read_rows", "write_section"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, fields: Sequence[str], row: dict[str, Any]) -> None:
    """Add a row to a CSV file, which gets a header when it is new."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerow(row)


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
