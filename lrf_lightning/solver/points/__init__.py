"""Measured models: the points of the frontier, and the choice of every objective among them."""
