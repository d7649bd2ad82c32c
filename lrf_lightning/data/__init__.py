"""Batches: where they come from, on which device they are, that every pass sees the same ones, images in them."""
