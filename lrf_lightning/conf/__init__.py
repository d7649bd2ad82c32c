"""Hydra config group ``compress``, which the search-path plugin adds to every Hydra app."""
