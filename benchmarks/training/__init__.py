"""Trains an image classifier from a recipe, as every run of the benchmarks does."""
