"""Measures what TrAct does and costs: `python -m benchmarks.paper`, `benchmarks.overhead` and others."""

from pathlib import Path

# The folder of the repository.
ROOT = Path(__file__).parents[1]
