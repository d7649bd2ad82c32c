"""Hydra's config groups ``compress`` and ``callbacks/rank_monitor``, which the search-path plugin adds to every app."""
