"""Durations of layers, kept in memory and in a folder of the user's cache, one small JSON file per layer.

The folder is ``lrf_lightning`` in the user's cache folder, or what the environment variable ``LRF_LIGHTNING_CACHE``
names; an empty variable means memory only. It may be deleted at any time. A file that cannot be read or written costs
another measurement, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from lrf_lightning.safe_files import write_bytes

__all__ = ["VARIABLE", "folder", "keep", "look_up"]

VARIABLE = "LRF_LIGHTNING_CACHE"

_log = logging.getLogger(__name__)
_memory: dict[Path | None, dict[str, dict[str, Any]]] = {}
_unwritable: set[Path] = set()


def folder() -> Path | None:
    """Where the files are, None for memory only."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    if named is not None:
        return Path(named)
    place = user_cache_path("lrf_lightning")
    return place if place.is_absolute() else None  # as for a user without a home


def look_up(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures that were kept for a key, None if there are none."""
    place, digest = folder(), _digest(key)
    found = _memory.setdefault(place, {}).get(digest)
    if found is not None or place is None:
        return found
    try:
        content = json.loads((place / f"latency-{digest}.json").read_bytes())
    except (OSError, ValueError):  # missing or damaged
        return None
    if (
        not isinstance(content, dict)
        or _digest(content.get("key")) != digest
        or not isinstance(content.get("figures"), dict)
    ):
        return None
    figures: dict[str, Any] = content["figures"]
    _memory[place][digest] = figures
    return figures


def keep(key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Remember figures for a key, which holds what JSON knows."""
    place, digest = folder(), _digest(key)
    _memory.setdefault(place, {})[digest] = dict(figures)
    if place is None:
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"key": key, "figures": figures}, indent=1)
        write_bytes(place / f"latency-{digest}.json", content.encode())
    except OSError as error:
        if place in _unwritable:  # every layer would say it
            return
        _unwritable.add(place)
        _log.info("Durations of layers are kept in memory only: %s", error)


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
