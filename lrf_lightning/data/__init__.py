"""Batches: where they come from, on which device they are, and that every pass sees the same ones."""
