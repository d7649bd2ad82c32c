"""Hydra looks here at every start of every app of the environment, so nothing heavy may be imported."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["LrfLightningSearchPath"]


class LrfLightningSearchPath(SearchPathPlugin):
    """Makes ``+compress=lossless`` known to an app; its own config comes first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder that holds nothing but the groups ``compress`` and ``callbacks/rank_monitor``."""
        search_path.append(provider="lrf_lightning", path="pkg://lrf_lightning.conf")
