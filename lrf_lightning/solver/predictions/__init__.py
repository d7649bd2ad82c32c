"""Curves for every layer: derivatives along its components, corrected by a few measured truncations."""
