"""Benchmarks against the baselines; every one writes its section of RESULTS.md."""
