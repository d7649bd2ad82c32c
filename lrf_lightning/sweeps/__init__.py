"""Hydra's multiruns: one table and one picture of all jobs, and one training for those that share it."""
