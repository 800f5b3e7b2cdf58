"""Measures what TrAct does and costs: `python -m benchmarks.paper`, `benchmarks.overhead` and others."""
