"""Ranks for a cost: options of every layer, the allocation among them, and the published greedy algorithm."""
