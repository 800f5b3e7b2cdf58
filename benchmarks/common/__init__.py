"""Holds what all benchmarks share: records of runs, statistics, plots, timing and processes."""
